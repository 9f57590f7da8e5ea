"""The editor's form of a workflow, feature by feature, against the prompt it stands for."""

import json

import pytest
from saved_models import GRAPHS
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import MODELS
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, load
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


class Source:
    RETURN_TYPES = ("INT", "IMAGE")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "mode": (["a", "b"],),
                "flag": ("BOOLEAN", {"default": True}),
            },
            "optional": {"forced": ("INT", {"forceInput": True}), "text": ("STRING", {"default": "none"})},
        }


class Sink:
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"count": ("INT", {"default": 3}), "size": ("FLOAT", {"default": 1.5})}
        return {"required": {"image": ("IMAGE",), **numbers}}


CLASSES = {"Source": Source, "Sink": Sink}


def node(key, kind, inputs=(), outputs=(), widgets=None, **more):
    slots = [{"name": n, "type": t, "link": link, **({"widget": {"name": n}} if w else {})} for n, t, link, w in inputs]
    outs = [{"name": t, "type": t} for t in outputs]
    return {"id": key, "type": kind, "inputs": slots, "outputs": outs, "widgets_values": widgets, "mode": 0, **more}


def source(key=1, widgets=(7, "fixed", "b", False, "words"), **more):
    return node(key, "Source", outputs=("INT", "IMAGE"), widgets=list(widgets), **more)


def sink(key=2, image=1, widgets=(5, 2.5), count=None, **more):
    inputs = [("image", "IMAGE", image, False)] + ([("count", "INT", count, True)] if count else [])
    return node(key, "Sink", inputs, ("IMAGE",), list(widgets), **more)


def read(tmp_path, nodes, links, **options):
    definitions = options.pop("definitions", None)
    data = {"nodes": nodes, "links": links, **({"definitions": definitions} if definitions else {})}
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(data))
    return {k: (v.type, v.inputs) for k, v in load(path, CLASSES, **options).nodes.items()}


PLAIN = {"seed": 7, "mode": "b", "flag": False, "text": "words"}


def test_widgets_by_position_and_a_link(tmp_path):
    got = read(tmp_path, [source(), sink()], [[1, 1, 1, 2, 0, "IMAGE"]])
    assert got == {"1": ("Source", PLAIN), "2": ("Sink", {"image": Link("1", 1), "count": 5, "size": 2.5})}


def test_missing_widget_values_are_defaults_and_dicts_go_by_name(tmp_path):
    nodes = [source(widgets=(7, "randomize")), sink(widgets=())]
    nodes[1]["widgets_values"] = {"size": 9.0, "extra": 1, "videopreview": {"hidden": True}}
    got = read(tmp_path, nodes, [[1, 1, 1, 2, 0, "IMAGE"]])
    assert got["1"][1] == {"seed": 7, "mode": "a", "flag": True, "text": "none"}
    assert got["2"][1] == {"image": Link("1", 1), "count": 3, "size": 9.0, "extra": 1}


def test_values_that_old_editors_saved_for_inputs_without_a_widget_are_passed_over(tmp_path):
    """Editors before 1.16 saved one for `forced`, too."""
    assert read(tmp_path, [source(widgets=(7, "fixed", "b", False, 0, "words"))], [])["1"][1] == PLAIN


def test_a_link_overrides_its_widget(tmp_path):
    links = [[1, 1, 1, 2, 0, "IMAGE"], [2, 1, 0, 2, 1, "INT"]]
    assert read(tmp_path, [source(), sink(count=2)], links)["2"][1]["count"] == Link("1", 0)


def test_links_in_dict_form(tmp_path):
    link = {"id": 1, "origin_id": 1, "origin_slot": 1, "target_id": 2, "target_slot": 0, "type": "IMAGE"}
    assert read(tmp_path, [source(), sink()], [link])["2"][1]["image"] == Link("1", 1)


def test_primitive_reroute_and_notes_disappear(tmp_path):
    nodes = [
        source(), sink(image=3, count=4), node(3, "Reroute", [("", "*", 1, False)], ("IMAGE",)),
        node(4, "PrimitiveNode", outputs=("INT",), widgets=[42, "fixed"]), node(5, "Note", widgets=["hello"]),
        node(6, "MarkdownNote", widgets=["hello"]),
    ]  # fmt: skip
    links = [[1, 1, 1, 3, 0, "IMAGE"], [3, 3, 0, 2, 0, "IMAGE"], [4, 4, 0, 2, 1, "INT"]]
    got = read(tmp_path, nodes, links)
    assert set(got) == {"1", "2"}
    assert got["2"][1] == {"image": Link("1", 1), "count": 42, "size": 2.5}


def test_set_and_get(tmp_path):
    nodes = [
        source(), sink(image=3), node(3, "SetNode", [("IMAGE", "IMAGE", 1, False)], ("*",), ["picture"]),
        node(4, "GetNode", outputs=("IMAGE",), widgets=["picture"]),
    ]  # fmt: skip
    links = [[1, 1, 1, 3, 0, "IMAGE"], [3, 4, 0, 2, 0, "IMAGE"]]
    assert read(tmp_path, nodes, links)["2"][1]["image"] == Link("1", 1)


def test_bypassed_nodes_pass_the_input_of_their_type_and_muted_ones_nothing(tmp_path):
    middle = node(3, "Foreign", [("model", "MODEL", None, False), ("image", "IMAGE", 1, False)], ("IMAGE",))
    links = [[1, 1, 1, 3, 1, "IMAGE"], [3, 3, 0, 2, 0, "IMAGE"]]
    nodes = [source(), sink(image=3), {**middle, "mode": 4}]
    assert read(tmp_path, nodes, links)["2"][1]["image"] == Link("1", 1)
    assert "image" not in read(tmp_path, [source(), sink(image=3), {**middle, "mode": 2}], links)["2"][1]
    nodes = [source(), sink(image=3), middle]
    assert read(tmp_path, nodes, links, bypass=["Foreign"])["2"][1]["image"] == Link("1", 1)
    assert "image" not in read(tmp_path, nodes, links, mute=["3"])["2"][1]
    with pytest.raises(ValueError, match="no node 'Nobody'"):
        read(tmp_path, nodes, links, bypass=["Nobody"])


def test_subgraphs_open_up_and_nest(tmp_path):
    inner = {
        "id": "uuid-inner",
        "nodes": [node(1, "Reroute", [("", "*", 1, False)], ("IMAGE",))],
        "links": [{"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0},
                  {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0}],
    }  # fmt: skip
    outer = {
        "id": "uuid-outer",
        "nodes": [
            node(7, "uuid-inner", [("image", "IMAGE", 1, False)], ("IMAGE",)),
            sink(8, image=2, count=3),
        ],
        "links": [{"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 7, "target_slot": 0},
                  {"id": 2, "origin_id": 7, "origin_slot": 0, "target_id": 8, "target_slot": 0},
                  {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 8, "target_slot": 1},
                  {"id": 4, "origin_id": 8, "origin_slot": 0, "target_id": -20, "target_slot": 0}],
    }  # fmt: skip
    used = node(5, "uuid-outer", [("image", "IMAGE", 1, False), ("count", "INT", None, True)], ("IMAGE",), [11])
    nodes = [source(), used, sink(2, image=2)]
    links = [[1, 1, 1, 5, 0, "IMAGE"], [2, 5, 0, 2, 0, "IMAGE"]]
    got = read(tmp_path, nodes, links, definitions={"subgraphs": [inner, outer]})
    assert set(got) == {"1", "2", "5:8"}
    assert got["5:8"][1] == {"image": Link("1", 1), "count": 11, "size": 2.5}
    assert got["2"][1]["image"] == Link("5:8", 0)


def test_api_form(tmp_path):
    data = {
        "3": {"class_type": "Source", "inputs": {"seed": 4}},
        "9": {"class_type": "Sink", "inputs": {"image": ["3", 1], "count": 1}, "_meta": {"title": "Out"}},
    }
    path = tmp_path / "api.json"
    path.write_text(json.dumps(data))
    prompt = load(path, CLASSES)
    assert prompt.nodes["9"].inputs == {"image": Link("3", 1), "count": 1} and prompt.find("Out").id == "9"
    with pytest.raises(ValueError, match="API form"):
        load(path, CLASSES, bypass=["9"])


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"a": 1}'])
def test_what_is_no_workflow_is_named(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no workflow"):
        load(path, CLASSES)
    with pytest.raises(FileNotFoundError, match="no workflow file"):
        load(tmp_path / "absent.json", CLASSES)


def test_edits_are_checked(tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"nodes": [source(), sink(), sink(4)], "links": [[1, 1, 1, 2, 0, "IMAGE"]]}))
    prompt = load(path, CLASSES)
    prompt.set("Source.seed=12", CLASSES)
    prompt.set("1.flag=true", CLASSES)
    assert prompt.nodes["1"].inputs == {**PLAIN, "seed": 12, "flag": True}
    for assignment, says in [
        ("Sink.count=1", "names 2 nodes"), ("1.seed=x", "must be a whole number"), ("1.mode=c", "choices are: a, b"),
        ("1.nothing=1", "has no input 'nothing'"), ("Nobody.seed=1", "no node 'Nobody'"), ("seed", "no assignment"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            prompt.set(assignment, CLASSES)


@pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")
@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.json")), ids=lambda path: path.stem)
def test_saved_graphs_resolve(path):
    before = get_host()
    set_host(StandaloneHost(models=MODELS, device="cpu"))
    try:
        nodes = load(path, {**STAND_INS, **NODE_CLASS_MAPPINGS}).nodes
    finally:
        set_host(before)
    assert nodes
    for entry in nodes.values():
        for value in entry.inputs.values():
            assert not isinstance(value, Link) or value.node in nodes


def sent(down=2, place=0, up="1", slot=1, by=3):
    """A link as cg-use-everywhere saves it."""
    ends = {"downstream": down, "downstream_slot": place, "upstream": up, "upstream_slot": slot}
    return {**ends, "controller": by, "type": "IMAGE"}


def read_sent(tmp_path, nodes, links, entries, broadcaster=(), **options):
    nodes = [*nodes, node(3, "Anything Everywhere", [("anything", "IMAGE", None, False)], **dict(broadcaster))]
    data = {"nodes": nodes, "links": links, "extra": {"ue_links": entries}}
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(data))
    return load(path, CLASSES, **options).nodes["2"].inputs.get("image")


def test_what_anything_everywhere_sent_is_a_link(tmp_path):
    assert read_sent(tmp_path, [source(), sink(image=None)], [], [sent()]) == Link("1", 1)


def test_a_real_link_stays_unless_nothing_runs_at_its_start(tmp_path):
    other, links = source(4), [[1, 4, 1, 2, 0, "IMAGE"]]
    assert read_sent(tmp_path, [source(), other, sink()], links, [sent()]) == Link("4", 1)
    assert read_sent(tmp_path, [source(), {**other, "mode": 4}, sink()], links, [sent()]) == Link("1", 1)


@pytest.mark.parametrize("entry", [sent(by=9), sent(place=7), sent(down=8)], ids=["by none", "no input", "no target"])
def test_what_was_sent_in_another_state_of_the_graph_is_passed_over(tmp_path, entry):
    assert read_sent(tmp_path, [source(), sink(image=None)], [], [entry]) is None


@pytest.mark.parametrize("mode", [2, 4])
def test_a_switched_off_sender_sends_nothing(tmp_path, mode):
    assert read_sent(tmp_path, [source(), sink(image=None)], [], [sent()], {"mode": mode}) is None
    assert read_sent(tmp_path, [source(), sink(image=None)], [], [sent()], bypass=["3"]) is None


def test_what_is_sent_inside_of_a_subgraph_may_come_from_its_input(tmp_path):
    inner = {
        "id": "sub", "inputs": [{"name": "image", "type": "IMAGE"}], "outputs": [],
        "nodes": [sink(image=None), node(3, "Anything Everywhere")], "links": [],
        "extra": {"ue_links": [sent(up="-10", slot=0)]},
    }  # fmt: skip
    outer = node(5, "sub", [("image", "IMAGE", 1, False)])
    got = read(tmp_path, [source(), outer], [[1, 1, 1, 5, 0, "IMAGE"]], definitions={"subgraphs": [inner]})
    assert got["5:2"][1]["image"] == Link("1", 1)


@pytest.mark.parametrize(
    "wrap",
    [lambda w: {"prompt": w, "client_id": "x"}, lambda w: {"input": {"workflow": w, "images": []}}],
    ids=["posted to ComfyUI", "posted to a worker"],
)
def test_workflows_inside_of_requests(tmp_path, wrap):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(wrap({"1": {"class_type": "Source", "inputs": {"seed": 7}}})))
    assert load(path, CLASSES).nodes["1"].inputs == {"seed": 7}
    path.write_text(json.dumps(wrap({"nodes": [source()], "links": []})))
    assert load(path, CLASSES).nodes["1"].inputs == PLAIN
    path.write_text(json.dumps(wrap({})))
    with pytest.raises(ValueError, match="is no workflow"):
        load(path, CLASSES)


def test_an_input_that_was_renamed_is_linked_in_both_forms(tmp_path):
    class Renamed(Sink):
        RENAMED_INPUTS = {"picture": "image"}

    path = tmp_path / "workflow.json"
    old = node(2, "Renamed", [("picture", "IMAGE", 1, False)])
    path.write_text(json.dumps({"nodes": [source(), old], "links": [[1, 1, 1, 2, 0, "IMAGE"]]}))
    classes = {**CLASSES, "Renamed": Renamed}
    assert load(path, classes).nodes["2"].inputs == {"image": Link("1", 1), "count": 3, "size": 1.5}
    path.write_text(json.dumps({"2": {"class_type": "Renamed", "inputs": {"picture": ["1", 1]}}}))
    assert load(path, classes).nodes["2"].inputs == {"image": Link("1", 1)}
