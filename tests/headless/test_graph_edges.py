"""Rarer forms of saved workflows, damaged ones, and edits that must not pass."""

import json

import pytest
from wanvideo_wrapper.headless.graph import Link, load
from wanvideo_wrapper.headless.widgets import Input, checked


class Maker:
    RETURN_TYPES = ("INT", "IMAGE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "flag": ("BOOLEAN", {"default": True})}}


class Taker:
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "count": ("INT", {"default": 3}), "size": ("FLOAT", {"min": 0.0})}}


CLASSES = {"Maker": Maker, "Taker": Taker}


def node(key, kind, inputs=(), outputs=(), widgets=None, **more):
    slots = [{"name": n, "type": t, "link": link, **({"widget": {"name": n}} if w else {})} for n, t, link, w in inputs]
    outs = [{"name": t, "type": t} for t in outputs]
    return {"id": key, "type": kind, "inputs": slots, "outputs": outs, "widgets_values": widgets, "mode": 0, **more}


def maker(key=1):
    return node(key, "Maker", outputs=("INT", "IMAGE"), widgets=[7, "fixed", False])


def taker(key=2, image=1, count=None):
    return node(key, "Taker", [("image", "IMAGE", image, False), ("count", "INT", count, True)], ("IMAGE",), [5, 2.5])


def saved(tmp_path, nodes, links, subgraphs=()):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"nodes": nodes, "links": links, "definitions": {"subgraphs": list(subgraphs)}}))
    return path


def read(tmp_path, nodes, links, subgraphs=(), **options):
    return load(saved(tmp_path, nodes, links, subgraphs), CLASSES, **options).nodes


def link(key, origin, origin_slot, target, target_slot):
    return {"id": key, "origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot}


INNER = {
    "id": "uuid",
    "nodes": [taker(8, image=1, count=2)],
    "links": [link(1, -10, 0, 8, 0), link(2, -10, 1, 8, 1), link(3, 8, 0, -20, 0)],
}


@pytest.mark.parametrize(
    ("used", "count"),
    [
        ({"inputs": [("count", "INT", None, True)], "widgets": []}, 5),
        ({"inputs": [("count", "INT", None, False)], "widgets": None}, 5),
        ({"inputs": [], "widgets": None}, 5),
        ({"inputs": [("count", "INT", None, True)], "widgets": [11]}, 11),
        ({"inputs": [("count", "INT", 9, True)], "widgets": [11]}, Link("1", 0)),
    ],
)
def test_an_unconnected_subgraph_input_leaves_the_inner_value(used, count, tmp_path):
    use = node(5, "uuid", [("image", "IMAGE", 1, False), *used["inputs"]], ("IMAGE",), used["widgets"])
    links = [[1, 1, 1, 5, 0, "IMAGE"], [9, 1, 0, 5, 1, "INT"]]
    inner = read(tmp_path, [maker(), use], links, [INNER])["5:8"]
    assert inner.inputs == {"image": Link("1", 1), "count": count, "size": 2.5}


def test_get_finds_the_set_of_the_same_subgraph_before_an_outer_one(tmp_path):
    def pair(key, link_id):
        return node(key, "SetNode", [("IMAGE", "IMAGE", link_id, False)], ("*",), ["picture"])

    get = node(4, "GetNode", outputs=("IMAGE",), widgets=["picture"])
    own = {"id": "own", "nodes": [maker(6), pair(3, 1), get, taker(8, 2)],
           "links": [link(1, 6, 1, 3, 0), link(2, 4, 0, 8, 0)]}  # fmt: skip
    outer = {"id": "outer", "nodes": [get, taker(8, 2)], "links": [link(2, 4, 0, 8, 0)]}
    nodes = [maker(), pair(2, 1), node(20, "own"), node(30, "outer")]
    got = read(tmp_path, nodes, [[1, 1, 1, 2, 0, "IMAGE"]], [own, outer])
    assert got["20:8"].inputs["image"] == Link("20:6", 1)
    assert got["30:8"].inputs["image"] == Link("1", 1)


def test_a_bypassed_node_passes_a_linked_widget_but_not_an_untouched_one(tmp_path):
    inputs = [("a", "INT", None, True), ("b", "INT", 1, True)]
    nodes = [maker(), node(3, "Sum", inputs, ("INT",), [1, 2], mode=4), taker(image=None, count=3)]
    got = read(tmp_path, nodes, [[1, 1, 0, 3, 1, "INT"], [3, 3, 0, 2, 1, "INT"]])
    assert got["2"].inputs["count"] == Link("1", 0)


def test_a_bypassed_and_a_muted_subgraph(tmp_path):
    use = node(5, "uuid", [("image", "IMAGE", 1, False)], ("IMAGE",))
    links = [[1, 1, 1, 5, 0, "IMAGE"], [2, 5, 0, 2, 0, "IMAGE"]]
    bypassed = read(tmp_path, [maker(), use, taker(image=2)], links, [INNER], bypass=["5"])
    assert set(bypassed) == {"1", "2"} and bypassed["2"].inputs["image"] == Link("1", 1)
    muted = read(tmp_path, [maker(), use, taker(image=2)], links, [INNER], mute=["5"])
    assert set(muted) == {"1", "2"} and "image" not in muted["2"].inputs


def test_nodes_inside_subgraphs_are_switched_by_class(tmp_path):
    use = node(5, "uuid", [("image", "IMAGE", 1, False)], ("IMAGE",))
    links = [[1, 1, 1, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]]
    last = node(9, "Other", [("image", "IMAGE", 2, False)])
    got = read(tmp_path, [maker(), use, last], links, [INNER], bypass=["Taker"])
    assert set(got) == {"1", "9"} and got["9"].inputs["image"] == Link("1", 1)


def test_rgthree_reroutes_and_null_links(tmp_path):
    reroute = node(3, "Reroute (rgthree)", [("", "*", 1, False)], ("*",))
    links = [None, [1, 1, 1, 3, 0, "*"], [3, 3, 0, 2, 0, "*"]]
    got = read(tmp_path, [maker(), reroute, taker(image=3)], links)
    assert set(got) == {"1", "2"} and got["2"].inputs["image"] == Link("1", 1)


def test_odd_keys_and_packs_of_the_editor(tmp_path):
    """Ids of both types in one file, and a number where the pack's name should be."""
    first, second = maker("1"), taker()
    second |= {"properties": {"cnr_id": 7}, "widgets_values": {"count": 5, "size": 2.5, "3": [1]}}
    nodes = read(tmp_path, [first, second], [[1, "1", 1.0, 2, 0.0, "IMAGE"]])
    assert nodes["2"].inputs["image"] == Link("1", 1) and nodes["2"].pack == "7"


def test_loops_of_the_editor_are_named(tmp_path):
    turning = [node(3, "Reroute", [("", "*", 1, False)], ("*",)), node(4, "Reroute", [("", "*", 2, False)], ("*",))]
    links = [[1, 4, 0, 3, 0, "*"], [2, 3, 0, 4, 0, "*"], [3, 3, 0, 2, 0, "*"]]
    path = saved(tmp_path, [*turning, taker(image=3)], links)
    with pytest.raises(ValueError, match=r"w\.json form a loop"):
        load(path, CLASSES)
    path = saved(tmp_path, [node(1, "self")], [], [{"id": "self", "nodes": [node(2, "self")], "links": []}])
    with pytest.raises(ValueError, match=r"w\.json form a loop"):
        load(path, CLASSES)


@pytest.mark.parametrize(
    ("nodes", "links"), [([{}], []), (["x"], []), ([maker()], [[1]]), ([maker()], 5), ([{"id": 1}], []),
                        ([{"id": 1, "type": None}], [])]
)  # fmt: skip
def test_damaged_workflows_are_named(nodes, links, tmp_path):
    with pytest.raises(ValueError, match=r"w\.json is a damaged workflow"):
        read(tmp_path, nodes, links)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("1.flag=maybe", "must be true or false, not 'maybe'"),
        ("2.image=x.png", r"'image' takes a link \(IMAGE\)"),
        ("2.size=nan", "must be at least 0.0, not nan"),
        ("2.size=-1", "must be at least 0.0, not -1.0"),
        ("2.count=1.5", "must be a whole number, not '1.5'"),
        ("2.crf=low", "must be a whole number, not 'low'"),
        ("2.other=1", "has no input 'other'; it has: image, count, size"),
    ],
)
def test_assignments_that_do_not_fit(assignment, says, tmp_path):
    nodes = [maker(), taker()]
    nodes[1]["widgets_values"] = {"count": 5, "size": 2.5, "crf": 19, "save_metadata": True}
    prompt = load(saved(tmp_path, nodes, [[1, 1, 1, 2, 0, "IMAGE"]]), CLASSES)
    with pytest.raises(ValueError, match=says):
        prompt.set(assignment, CLASSES)


def test_saved_values_that_no_class_declares_can_be_set(tmp_path):
    nodes = [maker(), taker()]
    nodes[1]["widgets_values"] = {"count": 5, "size": 2.5, "crf": 19, "save_metadata": True}
    prompt = load(saved(tmp_path, nodes, [[1, 1, 1, 2, 0, "IMAGE"]]), CLASSES)
    prompt.set("Taker.crf=30", CLASSES)
    prompt.set("Taker.save_metadata=no", CLASSES)
    assert prompt.nodes["2"].inputs["crf"] == 30 and prompt.nodes["2"].inputs["save_metadata"] is False


def test_numbers_without_limits_are_finite_enough():
    free = Input("x", "FLOAT", {}, True)
    assert checked(free, "1e3", "node") == 1000.0 and checked(free, 3, "node") == 3.0
    with pytest.raises(ValueError, match="must be a number, not nan"):
        checked(free, "nan", "node")
