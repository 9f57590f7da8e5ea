"""List widgets take what older graphs and other machines saved, and nodes get the names of today."""

import json
import logging

import pytest
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.headless.widgets import checked, inputs_of
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.node_tools import mappings
from wanvideo_wrapper.saved_values import Choices, ModelFiles, take_defaults, take_moved_files, take_renamed_inputs

LINUX = ["WanVideo/2_2/a.safetensors", "b.safetensors", "x/c.safetensors", "y/c.safetensors"]
WINDOWS = [name.replace("/", "\\") for name in LINUX]


@pytest.mark.parametrize(("here", "other"), [(LINUX, WINDOWS), (WINDOWS, LINUX)], ids=["linux", "windows"])
def test_a_name_of_another_system_is_the_same_file(here, other):
    files = ModelFiles(here)
    for own, saved in zip(here, other, strict=True):
        assert saved in files and files.current(saved) == own and files.current(own) == own


def test_a_file_in_another_folder_is_taken_where_there_is_one():
    files = ModelFiles(LINUX)
    assert files.current("WanVideo\\a.safetensors") == files.current("a.safetensors") == "WanVideo/2_2/a.safetensors"
    assert files.current("old/b.safetensors") == "b.safetensors"
    for name in ("c.safetensors", "z/c.safetensors", "none.safetensors", "", None, 3, ["b.safetensors"]):
        assert name not in files and files.current(name) is None
    assert files.current("y\\c.safetensors") == "y/c.safetensors"


def test_a_refusal_says_where_a_missing_file_belongs_and_which_of_several_to_choose():
    files = ModelFiles([*LINUX, *(f"more{n}.safetensors" for n in range(20))], place="models/vae")
    missing = files.refusal("model_name", "a\\gone.safetensors", "it")
    assert missing.startswith("'model_name' is 'a/gone.safetensors', which is not there: put it into models/vae, or ")
    assert missing.endswith("more7.safetensors, ...") and "more8" not in missing
    several = files.refusal("model_name", "z\\c.safetensors", "it")
    assert "lies at each of x/c.safetensors, y/c.safetensors: choose one" in several and "models/vae" not in several
    alone = ModelFiles([], place="models/vae").refusal("model_name", "gone.safetensors", "it")
    assert alone == "'model_name' is 'gone.safetensors', which is not there: put it into models/vae."
    assert files.refusal("model_name", 3, "3").startswith("'model_name' has no choice 3; choices are: WanVideo/2_2/a")
    assert Choices([]).refusal("mode", 3, "3") == "'mode' has no choice 3; choices are: there is none."


def test_options_that_were_renamed_or_left_empty():
    options = Choices(["disabled", "fast"], {"very_fast": "fast", "gone": "absent"}, "disabled")
    saved = {"fast": "fast", "very_fast": "fast", "": "disabled", None: "disabled"}
    assert {value: options.current(value) for value in saved} == saved
    assert "gone" not in options and "other" not in options and 7 not in options
    assert json.loads(json.dumps(options)) == ["disabled", "fast"] == options


class Loader:
    """Loads."""

    DISPLAY_NAME, FUNCTION = "A Loader", "load"
    RETURN_TYPES = ("STRING", "STRING", "INT", "STRING")

    @classmethod
    def INPUT_TYPES(cls):
        choices = {"model": (ModelFiles(LINUX),), "quantization": (["disabled", "fp8_e4m3fn_fast"],)}
        return {"required": choices, "optional": {"n": ("INT", {})}, "hidden": {"id": "UNIQUE_ID"}}

    def load(self, model, quantization, n=1, id=None):
        return model, quantization, n, id


def test_nodes_get_the_names_of_today(caplog):
    (node,) = mappings(Loader)[0].values()
    caplog.set_level(logging.INFO, "wanvideo")
    saved = {"model": "WanVideo\\a.safetensors", "quantization": "torchao_fp8dq", "n": 5, "id": "12"}
    # What ComfyUI's server asks before it queues the graph.
    declared = node.INPUT_TYPES()["required"]
    assert all(saved[name] in declared[name][0] for name in declared)
    assert node().load(**saved) == ("WanVideo/2_2/a.safetensors", "fp8_e4m3fn_fast", 5, "12")
    assert caplog.messages[0] == (
        "A Loader: 'model' was saved as 'WanVideo\\a.safetensors'; 'WanVideo/2_2/a.safetensors' is taken."
    )
    assert len(caplog.messages) == 2
    assert node().load(model="none", quantization="disabled") == ("none", "disabled", 1, None)
    entry = inputs_of(node)[0]
    assert checked(entry, "old\\b.safetensors", "here") == "b.safetensors"


def test_every_list_of_a_node_is_tolerant(tmp_path):
    before = get_host()
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    try:
        lists = [entry.kind for node in N.values() for entry in inputs_of(node) if isinstance(entry.kind, list)]
    finally:
        set_host(before)
    assert len(lists) > 40 and all(isinstance(choices, Choices) for choices in lists)


HTML = "<img src='data:image/png;base64,'>"
EMPTY = {"INT": (None, "", HTML), "FLOAT": (None, "", HTML), "STRING": (None,), "BOOLEAN": (None, HTML)}


def test_empty_values_of_every_node_become_its_defaults_before_the_server_sees_them(caplog):
    caplog.set_level(logging.INFO, "wanvideo")
    for name, node in N.items():
        widgets = [entry for entry in inputs_of(node) if entry.is_widget and not isinstance(entry.kind, list)]
        for nothing in (None, "", HTML):
            values = {entry.name: nothing for entry in widgets}
            prompt = {"7": {"class_type": name, "inputs": {"model": ["1", 0], **values}}}
            caplog.clear()
            take_defaults(prompt, N)
            # A text may be empty, and an empty text is a switch that is off.
            wanted = {entry.name: entry.default for entry in widgets if nothing in EMPTY[entry.kind]}
            assert prompt["7"]["inputs"] == {"model": ["1", 0], **values, **wanted}
            lines = zip(wanted, caplog.messages, strict=True)
            assert all(line.startswith(f"{node.DISPLAY_NAME} (#7): '{entry}' was saved empty") for entry, line in lines)


def test_values_that_are_there_and_nodes_of_others_are_left_alone(caplog):
    values = {"steps": 0, "shift": "", "scheduler": None, "cfg": ["3", 0]}
    foreign = {"class_type": "Foreign", "inputs": {"steps": None}}
    prompt = {"1": {"class_type": "WanVideoSampler", "inputs": values}, "2": foreign}
    take_defaults(prompt, N)
    assert foreign["inputs"] == {"steps": None}
    assert prompt["1"]["inputs"] == {"steps": 0, "shift": 5.0, "scheduler": None, "cfg": ["3", 0]}
    for odd in (None, [], {"1": None}, {"1": {"inputs": {}}}, {"1": {"class_type": "WanVideoSampler", "inputs": None}}):
        take_defaults(odd, N)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("WanVideoSampler", "teacache_args", "cache_args"),
        ("WanVideoDiffusionForcingSampler", "teacache_args", "cache_args"),
        ("WanVideoModelLoader", "vace_model", "extra_model"),
        ("WanVideoEncode", "driving_video", "image"),
        ("WanVideoImageClipEncode", "clip", "clip_vision"),
        ("MultiTalkWav2VecEmbeds", "audio", "audio_1"),
    ],
)
def test_inputs_that_were_renamed_get_the_name_of_today(kind, old, new, caplog):
    caplog.set_level(logging.INFO, "wanvideo")
    prompt = {"7": {"class_type": kind, "inputs": {"steps": 5, old: ["3", 0]}}}
    take_renamed_inputs(prompt, N)
    assert prompt["7"]["inputs"] == {"steps": 5, new: ["3", 0]}
    assert caplog.messages == [f"{N[kind].DISPLAY_NAME} (#7): the input '{old}' is '{new}' today."]
    both = {"7": {"class_type": kind, "inputs": {old: ["3", 0], new: ["4", 0]}}}
    take_renamed_inputs(both, N)
    assert both["7"]["inputs"] == {new: ["4", 0]}
    inputs = N[kind].INPUT_TYPES()
    declared = {**inputs["required"], **inputs.get("optional", {})}
    assert new in declared and old not in declared


def test_prompts_that_are_none_are_left_alone():
    foreign = {"class_type": "Foreign", "inputs": {"teacache_args": ["1", 0]}}
    for odd in (None, [], {"1": None}, {"1": {"inputs": {}}}, {"1": {"class_type": "WanVideoSampler"}}, {"1": foreign}):
        take_renamed_inputs(odd, N)
    assert foreign["inputs"] == {"teacache_args": ["1", 0]}


class Foreign:
    """Of another pack: a list in either way to declare one, and one of pictures."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"clip": (LINUX,), "image": (["x.png"], {}), "text": ("STRING", {})},
            "optional": {"vae": ("COMBO", {"options": WINDOWS}), "mode": ("COMBO", {}), "a": ("*",)},
        }


def test_files_of_other_packs_nodes_are_found_in_prompts_with_a_node_of_this_pack(caplog):
    caplog.set_level(logging.INFO)
    values = {"clip": "old\\a.safetensors", "vae": "x/c.safetensors", "text": "a.safetensors", "a": ["1", 0]}
    left = {"clip": "c.safetensors", "image": "pasted/x.png", "vae": 3, "mode": "a.safetensors"}
    prompt = {
        "1": {"class_type": "WanVideoVAELoader", "inputs": {"model_name": "moved/wan.safetensors"}},
        "2": {"class_type": "Foreign", "inputs": dict(values)},
        "3": {"class_type": "Foreign", "inputs": dict(left)},
        "4": {"class_type": "Unknown", "inputs": {"clip": "old/b.safetensors"}},
        "5": {"class_type": "Foreign"},
        "6": None,
    }
    alone = {"2": {"class_type": "Foreign", "inputs": dict(values)}}
    before = json.loads(json.dumps(prompt))
    for posted in (alone, prompt, None, []):
        take_moved_files(posted, {**N, "Foreign": Foreign}, N)
    assert alone["2"]["inputs"] == values
    assert prompt["2"]["inputs"] == {**values, "clip": LINUX[0], "vae": WINDOWS[2]}
    assert {key: prompt[key] for key in prompt if key != "2"} == {key: before[key] for key in before if key != "2"}
    assert caplog.messages == [
        f"Foreign (#2): 'clip' was saved as 'old\\a.safetensors'; '{LINUX[0]}' is taken.",
        f"Foreign (#2): 'vae' was saved as 'x/c.safetensors'; '{WINDOWS[2]}' is taken.",
    ]
