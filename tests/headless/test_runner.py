"""The runner on small node classes: order, caching, checks; and the commands' messages."""

import json

import pytest
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.check import GraphError
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import CancelledError, StandaloneHost, get_host, set_host

RAN = []


class Number:
    FUNCTION = "go"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1, "min": 0, "max": 9})}}

    def go(self, value):
        RAN.append(("number", value))
        return (value,)


class Add:
    FUNCTION = "go"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"forceInput": True}), "b": ("INT", {"forceInput": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls):
        return True

    def go(self, a, b):
        RAN.append(("add", a, b))
        return (a + b,)


class Show:
    FUNCTION = "go"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("*", {}), "choice": (["x/y", "z"],)},
            "hidden": {"key": "UNIQUE_ID", "info": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, choice):
        return True if choice != "z" else "z is not wanted"

    def go(self, value, choice, key, info):
        RAN.append(("show", value, key, info["workflow"]))
        return {"ui": {"text": [str(value)]}}


CLASSES = {"Number": Number, "Add": Add, "Show": Show}


def prompt(**nodes):
    made = {key: Node(id=key, type=kind, title="", inputs=dict(inputs)) for key, (kind, inputs) in nodes.items()}
    return Prompt(made, {"name": "saved"})


def run(given, host=None):
    RAN.clear()
    return Runner(given, CLASSES, host or StandaloneHost(device="cpu")).run()


def test_only_what_is_needed_runs_and_equal_nodes_run_once():
    shown = run(prompt(
        out=("Show", {"value": Link("sum", 0), "choice": "x\\y"}),
        sum=("Add", {"a": Link("n1", 0), "b": Link("n2", 0)}),
        n1=("Number", {"value": 4}), n2=("Number", {"value": "4"}), spare=("Number", {"value": 5}),
    ))  # fmt: skip
    assert shown == [{"text": ["8"]}]
    assert RAN == [("number", 4), ("add", 4, 4), ("show", 8, "out", {"name": "saved"})]


def test_an_output_may_be_one_of_a_list_of_choices(monkeypatch):
    monkeypatch.setattr(Number, "RETURN_TYPES", (["one", "two"],))
    shown = run(prompt(out=("Show", {"value": Link("n", 0), "choice": "x/y"}), n=("Number", {"value": 2})))
    assert shown == [{"text": ["2"]}]


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ({"n": ("Number", {"value": 1})}, "no node that saves or shows"),
        ({"s": ("Show", {"choice": "z"})}, "'value' is not connected"),
        ({"s": ("Show", {"value": Link("n", 0), "choice": "q"}), "n": ("Number", {})}, "choices are: x/y, z"),
        ({"s": ("Show", {"value": Link("n", 0), "choice": "z"}), "n": ("Number", {})}, "z is not wanted"),
        ({"s": ("Show", {"value": Link("n", 0)}), "n": ("Number", {"value": 99})}, "between 0 and 9, not 99"),
        ({"s": ("Show", {"value": Link("n", 0)}), "n": ("Number", {"value": "many"})}, "must be a whole number"),
        ({"s": ("Show", {"value": Link("gone", 0)})}, "linked to node gone"),
        ({"s": ("Show", {"value": Link("n", 3)}), "n": ("Number", {})}, "has no output 3"),
        ({"s": ("Show", {"value": Link("m", 0)}), "m": ("MelBandRoFormerSampler", {})}, "of ComfyUI-MelBandRoFormer"),
        ({"s": ("Show", {"value": Link("m", 0)}), "m": ("Strange", {})}, r"'Strange' \(#m\) of an unknown pack"),
        (
            {"s": ("Show", {"value": Link("a", 0)}), "a": ("Add", {"a": Link("a", 0), "b": Link("a", 0)})},
            "loop through",
        ),
    ],
)
def test_wrong_prompts_are_named_before_anything_runs(nodes, says):
    with pytest.raises(ValueError, match=says):
        run(prompt(**nodes))
    assert not [entry for entry in RAN if entry[0] != "number"]


class Gather:
    FUNCTION = "go"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"first": ("INT", {"forceInput": True})}}

    def go(self, first, **others):
        RAN.append(("gather", first, others))
        return ()


def test_links_to_sockets_of_an_older_name_arrive_where_any_name_is_taken():
    """Values of undeclared widgets do not, as in ComfyUI, where a function with fixed names fails over such a link."""
    RAN.clear()
    two, classes, host = Link("n", 0), {**CLASSES, "Gather": Gather}, StandaloneHost(device="cpu")
    gather, number = ("Gather", {"first": two, "older": two, "widget": 5}), ("Number", {"value": 2})
    Runner(prompt(g=gather, n=number), classes, host).run()
    assert ("gather", 2, {"older": 2}) in RAN
    show = ("Show", {"value": two, "older": two, "newer": 5})
    with pytest.raises(GraphError) as told:
        Runner(prompt(s=show, n=number), classes, host).check()
    said = "Show (#s): 'older' is linked, but the node has no such input: link one of value, choice."
    assert told.value.problems == (said,)


def test_cancel():
    host = StandaloneHost(device="cpu")
    host.cancel.set()
    with pytest.raises(CancelledError):
        run(prompt(s=("Show", {"value": Link("n", 0)}), n=("Number", {})), host)
    assert RAN == []


@pytest.fixture
def command(tmp_path, capsys):
    before = get_host()

    def call(*arguments):
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield call
    set_host(before)


def test_inspect_and_its_errors(command, tmp_path):
    tiny.image_to_video().save(tmp_path / "m.safetensors")
    status, out, _ = command("inspect", tmp_path / "m.safetensors")
    assert status == 0 and "3 layers of 128 channels in 2 heads" in out and "ClipImageExtension" in out
    status, out, err = command("inspect", tmp_path / "absent.safetensors")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "There is no file" in err


def test_run_reports_bad_workflows_in_one_line(command, tmp_path):
    status, _, err = command("run", tmp_path / "absent.json", "--device", "cpu")
    assert status == 2 and err == f"There is no workflow file {tmp_path / 'absent.json'}.\n"
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "../../etc/passwd"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    path = tmp_path / "w.json"
    path.write_text(json.dumps(workflow))
    status, _, err = command("run", path, "--device", "cpu", "--input", tmp_path / "in", "--out", tmp_path)
    assert status == 2 and "lies outside the input and output folders" in err.splitlines()[-1]
