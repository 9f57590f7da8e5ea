"""Everything wrong with a graph comes in one list before its first node runs; graph files as ComfyUI takes them."""

import codecs
import json

import pytest
import torch
from limits import interrupted, limited
from PIL import Image
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless import check as checking
from wanvideo_wrapper.headless import cli
from wanvideo_wrapper.headless.check import GraphError, unwritable
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, load
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

RAN = []


class Any:
    FUNCTION = "go"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"count": ("INT", {"default": 1, "max": 9}), "image": ("IMAGE",), "on": ("BOOLEAN", {})},
            "optional": {"x": ("FLOAT", {}), "any": ("*",), "text": ("STRING", {})},
        }

    def go(self, **values):
        RAN.append(values)
        return (torch.rand(2, 32, 32, 3),)


class Source(Any):
    @classmethod
    def INPUT_TYPES(cls):
        return {}


class Pass(Any):
    @classmethod
    def INPUT_TYPES(cls):
        return {"optional": {"image": ("IMAGE",)}}


class End(Pass):
    RETURN_TYPES = ()
    OUTPUT_NODE = True


CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS, "Any": Any, "Source": Source, "Pass": Pass, "End": End}


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(models=tmp_path, inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    (tmp_path / "in").mkdir()
    set_host(host)
    yield host
    set_host(before)


def read(tmp_path, graph):
    path = tmp_path / "w.json"
    path.write_text(graph if isinstance(graph, str) else json.dumps(graph))
    return load(path, CLASSES)


def api(**nodes):
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def run(tmp_path, host, graph):
    RAN.clear()
    return Runner(read(tmp_path, graph), CLASSES, host).run()


def problems(tmp_path, host, graph):
    with pytest.raises(GraphError) as caught:
        run(tmp_path, host, graph)
    assert RAN == []
    return caught.value.problems


def combine(**more):
    return ("VHS_VideoCombine", {"images": ["s", 0], "frame_rate": 25, "format": "video/h264-mp4", **more})


def test_all_problems_come_at_once(tmp_path, host):
    graph = api(
        s=("Any", {"count": 99, "image": ["gone", 0], "on": True}),
        m=("Missing1", {"image": ["n", 0]}), n=("Missing2", {}), o=("Missing3", {"image": ["m", 0]}),
        v=combine(crf=90, filename_prefix="../x"), w=combine(format="video/nvenc_h264-mp4", images=["o", 0]),
        a=("LoadAudio", {"audio": "gone.wav"}), p=("PreviewAny", {"source": ["a", 0]}),
        q=("WanVideoScheduler", {"scheduler": "rcm"}), r=("PreviewAny", {"source": ["q", 0]}),
        u=("PreviewAny", {"source": ["e", 0]}), e=("LoadImage", {"image": "../../etc/passwd"}),
    )  # fmt: skip
    found = problems(tmp_path, host, graph)
    for part in (
        "needs the nodes 'Missing2' (#n), 'Missing1' (#m), 'Missing3' (#o) of an unknown pack, which run in",
        "Any (#s): 'count' must be at most 9, not 99", "'image' is linked to node gone", "'Missing1' (#m)",
        "'Missing2' (#n)", "'Missing3' (#o)",
        "VHS_VideoCombine (#v): 'crf' must be between 0 and 51, not 90",
        "VHS_VideoCombine (#w): The format 'video/nvenc_h264-mp4' is written by ComfyUI only",
        "LoadAudio (#a): There is no file 'gone.wav'", "The scheduler 'rcm' works with 4 steps at most",
        "LoadImage (#e): '../../etc/passwd' lies outside",
    ):  # fmt: skip
        assert sum(part in problem for problem in found) == 1, (part, found)
    assert len(found) == 8


def test_nodes_that_forks_alone_have_are_not_expected_of_the_original(tmp_path, host):
    shown = {f"{key}s": ("PreviewAny", {"source": [key, 0]}) for key in "ac"}
    kinds = {"a": ("WanVideoOfSomeFork", {}), "c": ("easy thing", {})}
    fork, foreign = problems(tmp_path, host, api(**kinds, **shown))
    assert "'WanVideoOfSomeFork' (#a), which neither this pack nor the original has" in fork
    assert "'easy thing' (#c) of ComfyUI-Easy-Use, which runs in ComfyUI only" in foreign


def test_what_several_nodes_share_is_said_once(tmp_path, host):
    loaders = {key: ("LoadAudio", {"audio": "gone.wav"}) for key in "abc"}
    shown = {f"{key}s": ("PreviewAny", {"source": [key, 0]}) for key in "abc"}
    (problem,) = problems(tmp_path, host, api(**loaders, **shown))
    assert problem.startswith("LoadAudio (#a, #b, #c): There is no file 'gone.wav'")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"pix_fmt": "nonsense"}, "'pix_fmt' has no choice 'nonsense'; choices are: yuv420p, yuv420p10le"),
        ({"crf": -1}, "'crf' must be between 0 and 51, not -1"),
        ({"crf": "low"}, "'crf' must be a whole number, not 'low'"),
        ({"frame_rate": 0}, "'frame_rate' must be between 1 and 1000, not 0.0"),
        ({"frame_rate": 10**9}, "'frame_rate' must be between 1 and 1000"),
        ({"filename_prefix": "../../x"}, "lies outside the input and output folders"),
        ({"filename_prefix": "a/.."}, "names no file"),
        ({"format": "video/ProRes", "profile": "best"}, "'profile' has no choice 'best'"),
        ({"vae": ["s", 0]}, "'vae' takes VAE, but is linked to IMAGE"),
    ],
)
def test_videos_that_could_not_be_written(more, says, tmp_path, host):
    (problem,) = problems(tmp_path, host, api(s=("Source", {}), v=combine(**more)))
    assert says in problem and problem.startswith("VHS_VideoCombine (#v)")


@pytest.mark.parametrize("kind", ["LoadImage", "LoadAudio", "VHS_LoadVideo"])
def test_files_are_opened_before_anything_runs(kind, tmp_path, host):
    name = {"LoadImage": "image", "LoadAudio": "audio", "VHS_LoadVideo": "video"}[kind]
    (tmp_path / "in" / "x.bin").write_bytes(b"neither picture nor sound" * 40)
    graph = api(s=("Source", {}), l=(kind, {name: "x.bin"}), p=("PreviewAny", {"source": ["l", 0]}), e=("End", {}))
    (problem,) = problems(tmp_path, host, graph)
    assert problem.startswith(f"{kind} (#l): x.bin is no ")


def test_folders_that_cannot_be_written(tmp_path, host, monkeypatch):
    (tmp_path / "out").write_text("a file")
    (problem,) = problems(tmp_path, host, api(s=("Source", {}), v=combine()))
    assert problem.startswith(f"The output folder {tmp_path / 'out'} cannot be a folder, because")
    assert "cannot be written to" in unwritable(tmp_path.__class__("/proc/self/wanvideo"))
    monkeypatch.setattr(checking, "LEAST_ROOM", 2**80)
    assert "has room for only" in unwritable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_check_stops_before_the_run(tmp_path, host, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    for image, status, says in (("a.png", 0, "Nothing is wrong"), ("b.png", 2, "There is no file 'b.png'")):
        path = tmp_path / "w.json"
        path.write_text(json.dumps(api(l=("LoadImage", {"image": image}), s=("SaveImage", {"images": ["l", 0]}))))
        arguments = ["run", path, "--check", "--device", "cpu", "--input", tmp_path / "in", "--out", tmp_path / "out"]
        assert cli.main([str(a) for a in arguments]) == status
        captured = capsys.readouterr()
        assert says in captured.out + captured.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"count": float("inf")}, "'count' must be a whole number, not inf"),
        ({"count": "1e400"}, "'count' must be a whole number"),
        ({"count": [1, 2, 3]}, "is no link"),
        ({"count": {"__value__": [1]}}, "must be a whole number"),
        ({"x": float("nan")}, "must be a number"),
        ({"image": [1, 0]}, "'image' is [1, 0], which is no link"),
        ({"image": ["s", -1]}, "has no output -1"),
        ({"image": ["s", 0.5]}, "is no link"),
        ({"image": "x.png"}, "'image' takes IMAGE from another node, not the value 'x.png'"),
        ({"image": {"a": 1}}, "takes IMAGE from another node"),
        ({"text": [["s"]]}, "is no link"),
    ],
)
def test_values_that_comfyui_refuses_are_named(inputs, says, tmp_path, host):
    graph = api(s=("Source", {}), a=("Any", {"count": 1, "image": ["s", 0], "on": True} | inputs),
                e=("End", {"image": ["a", 0]}))  # fmt: skip
    (problem,) = problems(tmp_path, host, graph)
    assert says in problem and "(#" in problem


def test_values_that_comfyui_takes_are_taken(tmp_path, host):
    inputs = {"count": "3", "image": ["s", 0.0], "on": "false", "any": {"__value__": [1, 2]}, "self": 5, "spare": [1]}
    run(tmp_path, host, api(s=("Source", {}), a=("Any", inputs), e=("End", {"image": ["a", 0]})))
    values = RAN[1]
    assert (values["count"], values["on"], values["any"]) == (3, False, [1, 2])
    assert set(values) == {"count", "image", "on", "any"}
    shown = run(tmp_path, host, api(s=("Source", {}), v=combine(self=1, prompt="x")))
    assert shown[0]["videos"]


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(form, tmp_path):
    path = tmp_path / "w.json"
    path.write_bytes(json.dumps(api(e=("End", {}))).encode(form))
    assert path.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16, codecs.BOM_UTF32))
    assert set(load(path, CLASSES).nodes) == {"e"}


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        ({"1": {"class_type": "End", "inputs": None}}, r"End \(#1\) has no inputs"),
        ({"1": {"class_type": "End", "inputs": {}}, "2": 5}, "Node #2 has no class_type"),
        ({"1": {"class_type": ["End"], "inputs": {}}}, "Node #1 has no class_type"),
        ("[" * 100000, "nested too deeply"),
        ('{"1": {"class_type": "End", "inputs": {"x": ' + "[" * 150 + "]" * 150 + "}}}", "nested too deeply"),
        ("1" * 5000, "is not JSON"),
    ],
)
def test_damaged_files_are_named(graph, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, graph)


def test_meta_may_be_anything(tmp_path):
    metas = (None, 5, {"title": 3})
    graph = {str(n): {"class_type": "End", "inputs": {}, "_meta": meta} for n, meta in enumerate(metas)}
    assert [node.label for node in read(tmp_path, graph).nodes.values()] == ["End (#0)", "End (#1)", "3 (#2)"]


def test_long_chains(tmp_path, host):
    chain = {str(n): ("Pass", {"image": [str(n - 1), 0]}) for n in range(1, 5000)}
    run(tmp_path, host, api(**{"0": ("Source", {})}, **chain, e=("End", {"image": ["4999", 0]})))
    # Equal nodes run once.
    assert len(RAN) == 5001
    looped = api(**{"0": ("Pass", {"image": ["4999", 0]})}, **chain, e=("End", {"image": ["4999", 0]}))
    (problem,) = problems(tmp_path, host, looped)
    assert "has a loop through" in problem


def test_a_video_made_of_itself_is_named(tmp_path, host):
    graph = api(v=combine(images=["v", 0]), e=("End", {"image": ["v", 0]}))
    with interrupted():
        assert any("has a loop through" in problem for problem in problems(tmp_path, host, graph))


def reroute(key, link_in):
    return {"id": key, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": link_in}], "outputs": [{}]}


def test_long_chains_of_the_editor(tmp_path):
    nodes = [{"id": 0, "type": "Source"}, *(reroute(n, n) for n in range(1, 5000))]
    nodes.append({"id": 5000, "type": "End", "inputs": [{"name": "image", "type": "IMAGE", "link": 5000}]})
    links = [[n, n - 1, 0.0, n, 0.0, "*"] for n in range(1, 5001)]
    assert read(tmp_path, {"nodes": nodes, "links": links}).nodes["5000"].inputs["image"] == Link("0", 0)


def test_many_takers_of_long_chains_are_fast(tmp_path):
    """Reroute, Get and Set nodes are followed once, however many nodes take what they hand on."""
    numbers = range(5000)
    nodes = [{"id": "s", "type": "Source"}, *(reroute(n, n) for n in numbers)]
    links = [[n, n - 1 if n else "s", 0, n, 0, "*"] for n in numbers] + [["last", numbers[-1], 0, "", 0, "*"]]
    for n in numbers:
        nodes.append({"id": f"set{n}", "type": "SetNode", "widgets_values": [n], "inputs": [{"link": "last"}]})
        nodes.append({"id": f"get{n}", "type": "GetNode", "widgets_values": [n]})
        links.append([f"got{n}", f"get{n}", 0, "", 0, "*"])
        for name, link in (("a", "last"), ("b", f"got{n}")):
            nodes.append({"id": f"{name}{n}", "type": "End", "inputs": [{"name": "image", "link": link}]})
    with interrupted(5):
        prompt = read(tmp_path, {"nodes": nodes, "links": links})
    ends = [node for node in prompt.nodes.values() if node.type == "End"]
    assert len(ends) == 10_000 and {node.inputs["image"] for node in ends} == {Link("s", 0)}


def test_two_nodes_of_one_id_are_named(tmp_path):
    """Links cannot tell them apart, and one of them would be left out."""
    nodes = [{"id": 1, "type": "Source"}, {"id": "1", "type": "End", "inputs": [{"name": "image", "link": 1}]}]
    inner = {"id": "g", "nodes": nodes, "links": []}
    for graph in ({"nodes": nodes}, {"nodes": [{"id": 3, "type": "g"}], "definitions": {"subgraphs": [inner]}}):
        with pytest.raises(ValueError, match="Source and End, have the id 1: open it in ComfyUI"):
            read(tmp_path, graph)


def test_values_beyond_a_million_are_not_read(tmp_path):
    """A file of 3 MB would take 70."""
    with pytest.raises(ValueError, match="holds more than 1000000 values"):
        read(tmp_path, "[" + "[]," * 1_000_000 + "[]]")
    assert read(tmp_path, api(e=("End", {"picture": "A" * 10**6}))).nodes["e"].inputs["picture"]


def nested(count, levels):
    """Subgraphs that each use the next one `count` times."""
    subgraphs = [
        {"id": f"g{n}", "nodes": [{"id": i, "type": f"g{n + 1}"} for i in range(count)], "links": []}
        for n in range(levels)
    ]
    last = {"id": f"g{levels}", "nodes": [{"id": 1, "type": "End"}], "links": []}
    return {"nodes": [{"id": 9, "type": "g0"}], "links": [], "definitions": {"subgraphs": [*subgraphs, last]}}


def test_subgraphs_do_not_grow_without_bound(tmp_path):
    assert set(read(tmp_path, nested(1, 3)).nodes) == {"9:0:0:0:1"}
    with pytest.raises(ValueError, match="more than 20000 nodes"):
        read(tmp_path, nested(2, 40))
    wide = nested(1000, 1)
    wide["definitions"]["subgraphs"][1]["links"] = [[n, 1, 0, 2, 0] for n in range(5000)]
    with limited(tmp_path), pytest.raises(ValueError, match="or 2000000 values"):
        read(tmp_path, wide)
    with pytest.raises(ValueError, match="form a loop"):
        read(tmp_path, nested(1, 200))


def test_one_use_of_a_subgraph_is_bypassed_by_full_id(tmp_path):
    inner = {"id": "g", "nodes": [{"id": 5, "type": "End"}], "links": []}
    graph = {"nodes": [{"id": 1, "type": "g"}, {"id": 2, "type": "g"}], "definitions": {"subgraphs": [inner]}}
    path = tmp_path / "w.json"
    path.write_text(json.dumps(graph))
    assert set(load(path, CLASSES, bypass=["1:5"]).nodes) == {"2:5"}
    assert set(load(path, CLASSES, mute=["2"]).nodes) == {"1:5"}
    with pytest.raises(ValueError, match="no node '1:6'"):
        load(path, CLASSES, bypass=["1:6"])
    with pytest.raises(ValueError, match=r"1 holds other nodes: name one of them, End \(#1:5\)"):
        load(path, CLASSES).set("1.image=x", CLASSES)


def test_input_types_reach_the_nodes_own_check(tmp_path, host):
    class Judge(Pass):
        @classmethod
        def VALIDATE_INPUTS(cls, input_types, **values):
            RAN.append((input_types, values))
            return "no" if values else True

    RAN.clear()
    classes = {**CLASSES, "Judge": Judge}
    for inputs in ({"image": ["s", 0]},):
        prompt = read(tmp_path, api(s=("Source", {}), j=("Judge", inputs), e=("End", {"image": ["j", 0]})))
        Runner(prompt, classes, host).check()
    assert RAN == [({"image": "IMAGE"}, {})]
