"""The nodes in a real ComfyUI server on CPU: their interfaces, and graphs posted over its HTTP API."""

import json

import pytest
from comfy_server import RefusedError
from posted_graphs import api_prompt
from saved_models import GRAPH_RUNS, GRAPHS, ROOT
from system_graphs import frames_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import WORKFLOW

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


def videos(files):
    """Without the previews, which ComfyUI writes for nodes that headless runs leave out."""
    return [path for path in files if path.suffix == ".mp4"]


def test_interfaces(server):
    original = json.loads((ROOT / "tests/data/node_interfaces.json").read_text())
    listed = server.get("/object_info")
    assert len(original) == 146 and set(original) <= set(listed)
    for name, wanted in original.items():
        node = listed[name]
        for section in ("required", "optional"):
            names = [entry[0] for entry in wanted["inputs"].get(section, [])]
            assert list(node["input"].get(section, {}))[: len(names)] == names
        assert [list(pair) for pair in zip(node["output"], node["output_name"], strict=True)] == wanted["outputs"]
        assert node["display_name"] == wanted["display_name"] and node["category"] == wanted["category"]
        assert node["output_node"] == wanted["output_node"]


PICTURE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}


def node_named(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_a_node_that_lacks_inputs_and_is_not_needed_blocks_nothing(server):
    shown = node_named("PreviewImage", images=["1", 0])
    assert len(server.run({"1": PICTURE, "2": shown, "3": node_named("WanVideoSLG")})) == 1


def test_a_file_that_was_saved_under_another_folder_and_system_is_taken(server):
    shown = node_named("PreviewAny", source=["1", 0])
    loader = node_named("WanVideoVAELoader", model_name="WanVideo\\tiny_wan_vae.safetensors", precision="fp32")
    server.run({"1": loader, "2": shown})
    assert "'tiny_wan_vae.safetensors' is taken" in (server.base / "log.txt").read_text()
    loader["inputs"]["model_name"] = "WanVideo\\of_nobody.safetensors"
    with pytest.raises(RefusedError, match="which is not there: put it into models/vae and press R") as refusal:
        server.queue({"1": loader, "2": shown})
    told = json.loads(str(refusal.value))["node_errors"]
    assert {key: len(node["errors"]) for key, node in told.items()} == {"1": 1}, "not once for each input"


def test_widgets_that_were_saved_empty_take_their_defaults(server):
    shown = node_named("PreviewAny", source=["1", 0])
    options = node_named("WanVideoBlockSwap", blocks_to_swap=None, offload_img_emb=None, offload_txt_emb=None)
    before = len((server.base / "log.txt").read_text())
    server.run({"1": options, "2": shown})
    told = (server.base / "log.txt").read_text()[before:]
    assert all(f"'{name}'" in told for name in options["inputs"]), told


def test_demo(filled_server):
    edits = ("WanVideoSampler.steps=2", "MultiTalkWav2VecEmbeds.num_frames=40")
    prompt, workflow = api_prompt(WORKFLOW, filled_server.base, edits, ())
    (path,) = videos(filled_server.run(prompt, workflow))
    assert frames_of(path) == 40


@pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")
@pytest.mark.parametrize("name", GRAPH_RUNS)
def test_saved_graph(name, filled_server):
    pattern, edits, bypassed, frames = GRAPH_RUNS[name]
    (graph,) = GRAPHS.glob(pattern)
    prompt, workflow = api_prompt(graph, filled_server.base, edits, bypassed)
    (path,) = videos(filled_server.run(prompt, workflow))
    assert frames_of(path) == frames


def wrong_values(value):
    """A prompt with this value in one widget of each node: a number, or a list."""
    prompt = {}
    for name, node in NODE_CLASS_MAPPINGS.items():
        declared = node.INPUT_TYPES()
        for entry, (kind, *_) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if kind in ("INT", "FLOAT") or isinstance(kind, list):
                key = f"{name}.{entry}"
                shown = node_named("PreviewAny", source=[key, 0])
                prompt |= {key: node_named(name, **{entry: value}), f"{key} shown": shown}
    return prompt


# NaN is not among them: ComfyUI lets it pass, and the node refuses it.
@pytest.mark.parametrize("value", ["of no kind", {}, [1], -(10**9), 10**400], ids=lambda value: str(value)[:12])
def test_wrong_values_are_refused_in_sentences(value, server):
    prompt = wrong_values(value)
    with pytest.raises(RefusedError) as refusal:
        server.queue(prompt)
    told = json.loads(str(refusal.value))["node_errors"]
    assert set(told) >= {key for key in prompt if not key.endswith(" shown")} and len(told) > 400
    for key, entry in told.items():
        for error in entry["errors"]:
            assert "\n" not in error["message"] + error["details"], key
            assert error["extra_info"].get("exception_type", "ValueError") == "ValueError", (key, error)
