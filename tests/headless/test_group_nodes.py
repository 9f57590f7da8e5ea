"""Group nodes of old graphs, against the prompts that ComfyUI's own page makes of them.

`tests/data/group_nodes`: groups made in the page of the front end that the file names, saved, given values of their own
(and names, and hidden inputs), opened there again, and the output of its app.graphToPrompt().
"""

import json
from pathlib import Path

import pytest
from limits import limited
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.check import GraphError, check
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, as_api, load
from wanvideo_wrapper.headless.widgets import inputs_of
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

FILES = sorted((Path(__file__).parents[1] / "data" / "group_nodes").glob("*.json"))
ALL = {**STAND_INS, **NODE_CLASS_MAPPINGS}


class Source:
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "mode": (["a", "b"],)}}


class Join:
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "size": ("FLOAT", {"default": 1.5})}, "optional": {"mask": ("MASK",)}}


class End:
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}


CLASSES = {"Source": Source, "Join": Join, "End": End}
SOCKETS = [{"name": "image", "type": "IMAGE"}, {"name": "mask", "type": "MASK"}]
SOURCE = {"type": "Source", "outputs": [{"name": "IMAGE", "type": "IMAGE"}], "widgets_values": [1, "fixed", "a"]}
JOIN = {"type": "Join", "inputs": SOCKETS, "outputs": [{"name": "IMAGE", "type": "IMAGE"}], "widgets_values": [2.5]}
PAIR = {"nodes": [SOURCE, JOIN], "links": [[0, 0, 1, 0, 1, "IMAGE"]], "external": []}


@pytest.fixture(autouse=True)
def host(tmp_path):
    before = get_host()
    set_host(StandaloneHost(models=tmp_path, inputs=tmp_path, outputs=tmp_path / "out", device="cpu"))
    yield get_host()
    set_host(before)


def workflow(definition=PAIR, kind="workflow>pair", widgets=(7, "fixed", "b", 4.5), slot=1, **more):
    """A group node whose output goes to a node that shows it. Of a pair, output 0 is the mask."""
    group = {"id": 5, "type": kind, "title": "mine", "widgets_values": list(widgets), "outputs": [{}], **more}
    end = {"id": 6, "type": "End", "inputs": [{"name": "image", "type": "IMAGE", "link": 1}]}
    groups = {} if definition is None else {"pair": definition}
    return {"nodes": [group, end], "links": [[1, 5, slot, 6, 0, "IMAGE"]], "extra": {"groupNodes": groups}}


def read(tmp_path, graph, **options):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(graph))
    return load(path, CLASSES, **options)


def declared(prompt):
    """Without what the page alone has: the values of upload buttons."""
    names = {key: {entry.name for entry in inputs_of(ALL[node["class_type"]])} for key, node in prompt.items()}
    return {
        key: (node["class_type"], {k: v for k, v in node["inputs"].items() if k in names[key]})
        for key, node in prompt.items()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_prompt_is_that_of_the_page(path, tmp_path):
    kept = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "w.json").write_text(json.dumps(kept["workflow"]))
    assert declared(as_api(load(tmp_path / "w.json", ALL))) == declared(kept["prompt"])


@pytest.mark.parametrize("kind", ["workflow/pair", "workflow>pair"])
def test_values_of_the_group_node_take_the_place_of_those_inside(kind, tmp_path):
    nodes = read(tmp_path, workflow(kind=kind)).nodes
    assert nodes["5:0"].inputs == {"seed": 7, "mode": "b"}
    assert nodes["5:1"].inputs == {"image": Link("5:0", 0), "size": 4.5}
    assert nodes["6"].inputs == {"image": Link("5:1", 0)}


def test_a_list_in_a_primitive_has_a_control_and_a_filter(tmp_path):
    choice = {"name": "mode", "type": "COMBO", "widget": {"name": "mode"}}
    primitive = {"type": "PrimitiveNode", "outputs": [{"name": "COMBO", "widget": {"name": "mode"}}]}
    definition = {
        "nodes": [primitive, {**SOURCE, "inputs": [choice]}, JOIN],
        "links": [[0, 0, 1, 0, 1, "COMBO"], [1, 0, 2, 0, 2, "IMAGE"]],
    }
    nodes = read(tmp_path, workflow(definition, widgets=["b", "fixed", "", 9, "fixed", 3.5])).nodes
    assert nodes["5:1"].inputs == {"seed": 9, "mode": "b"} and nodes["5:2"].inputs["size"] == 3.5


def test_nodes_inside_are_switched_and_set(tmp_path):
    for name in ("5:1", "Join"):
        nodes = read(tmp_path, workflow(), bypass=[name]).nodes
        assert set(nodes) == {"5:0", "6"} and nodes["6"].inputs["image"] == Link("5:0", 0)
    for name in ("5", "mine", "workflow>pair"):
        assert set(read(tmp_path, workflow(), mute=[name]).nodes) == {"6"}
    prompt = read(tmp_path, workflow())
    prompt.set("5:1.size=9", CLASSES)
    assert prompt.nodes["5:1"].inputs["size"] == 9.0
    with pytest.raises(ValueError, match="Node 5 holds other nodes: name one of them"):
        prompt.set("5.size=9", CLASSES)


INSIDE = {"id": "g", "nodes": [{"id": 1, "type": "workflow>pair"}], "links": [[1, 1, 1, -20, 0, "IMAGE"]]}


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (workflow(None), r"mine \(#5\): it is a group node whose nodes are not in the file"),
        (workflow({**PAIR, "nodes": [SOURCE, {"type": "Gone"}]}), r"that holds nodes that are not known here \(Gone\)"),
        (workflow({**PAIR, "nodes": [SOURCE, {"type": "workflow>pair"}]}), r"not known here \(workflow>pair\)"),
        (
            {**workflow(kind="g"), "definitions": {"subgraphs": [{**INSIDE, "links": [[1, 1, 1, -20, 1, "IMAGE"]]}]}},
            r"workflow>pair \(#5:1\): it is a group node inside a subgraph",
        ),
    ],
    ids=["absent", "unknown", "nested", "in a subgraph"],
)
def test_what_the_page_does_not_open_is_named(graph, says, tmp_path, host):
    with pytest.raises(GraphError, match=f"{says}.* choose 'Convert to nodes' in its menu") as caught:
        check(read(tmp_path, graph), CLASSES, host)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"nodes": None}, {"nodes": [SOURCE, None]}, {"links": None}, {"links": [[0, 0, 1, 5, 1]]}, {"links": [[0, 0]]},
        {"links": [[0, 0, 2, 0, 1]]}, {"links": [[-1, 0, 1, 0, 1]]}, {"links": [[0, 0, 1, "a", 1]]}, {"external": [1]},
        {"config": [1]}, {"config": {"0": {"output": {"0": 5}}}}, {"nodes": [{"type": []}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_definition_is_named(damage, tmp_path):
    with pytest.raises(ValueError, match=r"mine \(#5\): what this group node holds is damaged") as caught:
        read(tmp_path, workflow({**PAIR, **damage}))
    assert "\n" not in str(caught.value)
    assert set(read(tmp_path, workflow({**PAIR, **damage}), bypass=["5"]).nodes) == {"6"}


def test_a_link_to_an_input_that_the_group_does_not_show_is_told(tmp_path, caplog):
    graph = workflow(inputs=[{"name": "gone", "type": "MASK", "link": 9}])
    assert "mask" not in read(tmp_path, graph).nodes["5:1"].inputs
    assert "mine (#5) shows no input 'gone': what is linked to it is left out." in caplog.text


def test_growth_is_bounded(tmp_path):
    many, wide = {"nodes": [SOURCE] * 1000, "links": []}, {"nodes": [{**JOIN, "inputs": SOCKETS * 20000}], "links": []}
    for definition, options in ((many, {}), (many, {"bypass": ["Join"]}), (wide, {})):
        graph = workflow(definition)
        graph["nodes"] += [{"id": 100 + n, "type": "workflow>pair"} for n in range(2000)]
        with limited(tmp_path), pytest.raises(ValueError, match="more than 20000 nodes or 2000000 values"):
            read(tmp_path, graph, **options)
    definition["nodes"].append({"type": "Gone"})
    with limited(tmp_path):
        assert len(read(tmp_path, graph).nodes) == 2002
