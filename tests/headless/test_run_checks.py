"""What the runner refuses before anything runs, and how the commands end."""

import json
import os
import signal

import pytest
from graph_builder import Graph
from wanvideo_wrapper.headless import check as checking
from wanvideo_wrapper.headless import cli
from wanvideo_wrapper.headless.graph import Link, Node, Prompt, load
from wanvideo_wrapper.headless.job import Edits, Job
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

RAN = []


class Whole:
    FUNCTION = "go"
    RETURN_TYPES = ("INT", "STRING")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    def go(self, value):
        RAN.append("whole")
        return value, str(value)


class Real:
    FUNCTION = "go"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"number": ("FLOAT", {"default": 1.0})},
            "optional": {"either": ("IMAGE,INT",), "low": ("INT", {"default": 0}), "high": ("INT", {"default": 9})},
            "hidden": {"info": "EXTRA_PNGINFO", "prompt": "PROMPT"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, low=0, high=9):
        return low < high or "low must be below high"

    def go(self, number, info, prompt, either=None, low=0, high=9):
        RAN.append(("real", number, either))
        return {"ui": {"info": [info, prompt]}}


CLASSES = {"Whole": Whole, "Real": Real}


def run(**nodes):
    RAN.clear()
    made = {}
    for key, (kind, inputs, *pack) in nodes.items():
        made[key] = Node(id=key, type=kind, title="", inputs=dict(inputs), pack=pack[0] if pack else "")
    return Runner(Prompt(made, {}), CLASSES, StandaloneHost(device="cpu")).run()


def test_whole_numbers_go_to_reals_and_one_of_several_types_is_enough():
    run(r=("Real", {"number": Link("w", 0), "either": Link("w", 0)}), w=("Whole", {"value": 4}))
    assert RAN == ["whole", ("real", 4, 4)]


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ({"r": ("Real", {"number": Link("w", 1)}), "w": ("Whole", {})}, "takes FLOAT, but is linked to STRING"),
        ({"r": ("Real", {"either": Link("w", 1)}), "w": ("Whole", {})}, "takes IMAGE,INT, but is linked to STRING"),
        ({"r": ("Real", {"number": Link("w", 2)}), "w": ("Whole", {})}, "has no output 2"),
        ({"r": ("Real", {"low": 5, "high": 5})}, "low must be below high"),
        ({"r": ("Real", {"low": 12})}, "low must be below high"),
        ({"w": ("Whole", {}), "s": ("SaveVideo", {"video": Link("w", 0)}, "comfy-core")},
         r"known here, only SaveVideo \(#s\) of the pack 'comfy-core'"),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(nodes, says):
    with pytest.raises(ValueError, match=says):
        run(**nodes)
    assert RAN == []


def test_the_api_form_stores_no_editor_workflow(tmp_path):
    path = tmp_path / "api.json"
    path.write_text(json.dumps({"1": {"class_type": "Real", "inputs": {"number": 2}}}))
    (shown,) = Runner(load(path, CLASSES), CLASSES, StandaloneHost(device="cpu")).run()
    info, prompt = shown["info"]
    assert info == {} and prompt["1"]["inputs"] == {"number": 2.0}


@pytest.fixture
def workflow(tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"1": {"class_type": "PreviewAny", "inputs": {"source": "hello"}}}))
    before = get_host()
    yield path
    set_host(before)


def test_a_run_gives_ctrl_c_back_and_prints_what_nodes_show(workflow, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_result_lacks_by_bypassed_nodes_is_said_in_the_end(workflow, tmp_path, caplog):
    graph = Graph("bypassed", "")
    made = graph.add("EmptyImage", width=32, height=32, batch_size=2)
    blurred = graph.add("ImageBlur", image=made, title="Softer")
    graph.add("ImageBlur", image=blurred, title="For nobody")
    shown = graph.add("PreviewAny", source=graph.add("GetImageSizeAndCount", image=blurred), title="The end")
    workflow.write_text(json.dumps(graph.saved()))
    command = ["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--bypass", "ImageBlur"]) == 0
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said == f"Bypassed by --bypass, so that the result lacks what they do: Softer (#{blurred.id})."
    job = Job(workflow=workflow, edits=Edits(bypass=["ImageBlur"], mute=[str(shown.id)]))
    assert job.without() == []


def test_ctrl_c_ends_with_130_and_a_second_one_does_not_wait(workflow, tmp_path, monkeypatch, capsys):
    def once(self):
        os.kill(os.getpid(), signal.SIGINT)
        self._host.check_cancelled()
        return []

    def twice_without_a_check(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return []

    for run in (once, twice_without_a_check):
        monkeypatch.setattr(Runner, "run", run)
        assert cli.main(["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]) == 130
        assert capsys.readouterr().err.endswith("Cancelled.\n")


def test_unexpected_errors_are_one_line_too(workflow, tmp_path, monkeypatch, capsys):
    def broken(self):
        raise KeyError("gone")

    monkeypatch.setattr(Runner, "run", broken)
    arguments = ["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "KeyError('gone') was not expected; --debug shows where it arose.\n"
    for debugging in (["--debug", *arguments], [*arguments, "--debug"]):
        assert cli.main(debugging) == 2
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run"], ["inspect"]])
def test_a_folder_is_no_file(command, tmp_path, capsys):
    assert cli.main([*command, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err


def test_wrong_options_are_named(workflow, tmp_path, capsys):
    arguments = ["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]
    for extra, says in (["--set", "9.x=1"], "no node '9'"), (["--bypass", "1"], "API form"):
        assert cli.main([*arguments, *extra]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(("form", "width", "refused"), [("h265", 48, True), ("h265", 64, False), ("h264", 48, False)])
def test_frames_too_small_for_the_encoder_are_refused_before_they_are_made(form, width, refused):
    written = {"images": Link("d", 0), "format": f"video/{form}-mp4"}
    combine = Node(id="v", type="VHS_VideoCombine", title="", inputs=written)
    decode = Node(id="d", type="WanVideoDecode", title="", inputs={"samples": Link("s", 0)})
    sampler = Node(id="s", type="WanVideoSampler", title="", inputs={"image_embeds": Link("e", 0)})
    embeds = Node(id="e", type="WanVideoEmptyEmbeds", title="", inputs={"width": width, "height": 640})
    prompt = Prompt({node.id: node for node in (combine, decode, sampler, embeds)}, {})
    says = "libx265 writes frames of 64x64 or more, these are 48x640"
    assert (says in checking._too_small(combine, prompt)) == refused
    assert checking._too_small(decode, prompt) == ""
