"""Mutated graphs end in a sentence (ValueError) or in a checked prompt; never in another exception, never late.

A graph is read off a string of bytes, each a choice: drawing it takes hypothesis one draw, where strategies for every
part of it took ten times as long as the reader. When the bytes are out every choice is the first, so that cases shrink.

FUZZ_EXAMPLES sets how many cases each test gets (default: a short run; `make fuzz`: 10,000).
"""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from limits import limited
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.check import check
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import as_api, load
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.name: path.read_bytes() for path in ROOT.glob("example_workflows/*.json")}
for path in ROOT.glob("tests/data/group_nodes/*.json"):
    WORKFLOWS[path.name] = json.dumps(json.loads(path.read_bytes())["workflow"]).encode()
CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
run = settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 1000)

ODD = (
    None, True, False, 0, -1, 1, 2, 3, 10**30, 0.0, -0.5, 2.5, 1e308, float("inf"), float("nan"), "", "1", "x", "-10",
    "false", "\0", "../x", "/etc/passwd", "g", "Reroute", "a" * 300, "\ud800", [], {}, [[]], [None], ["1", 0],
    ["1", 0.0], ["2", -1], [1, 0], ["3", 10**30], {"__value__": 1}, {"__value__": ["1", 0]}, {"a": {}}, {"": None},
)  # fmt: skip
NAMES = ("images", "image", "self", "format", "frame_rate", "source", "any", "crf", "filename_prefix", "value", "")
KINDS = ("LoadImage", "PreviewAny", "VHS_VideoCombine", "EmptyImage", "SaveImage", "Gone", "SimpleMath+", "CreateVideo")
INNER = ("Reroute", "GetNode", "SetNode", "PrimitiveNode", "Note", "g", "h", "workflow>k", "workflow/k")


class Choices:
    """Choices read off bytes."""

    def __init__(self, data):
        self._bytes = iter(data)

    def below(self, count):
        return next(self._bytes, 0) % count

    def pick(self, options):
        return options[self.below(len(options))]

    def value(self, depth=2):
        match self.below(8 if depth else 4):
            case 4:
                return [self.value(depth - 1) for _ in range(self.below(4))]
            case 5:
                return {self.pick(("__value__", "a", "name")): self.value(depth - 1) for _ in range(self.below(3))}
            case 6:
                return "".join(map(chr, (next(self._bytes, 65) for _ in range(self.below(8)))))
            case 7:
                return next(self._bytes, 0) * 10 ** self.below(12) - 1000
        # A copy: what takes it may write into it.
        return deepcopy(self.pick(ODD))

    def rarely_odd(self, value):
        """The value, or in one of eight cases an odd one."""
        return self.value() if self.below(8) == 7 else value

    def link(self):
        return [self.pick("123"), self.pick((0, 1, 2, -1, 0.0))]

    def api(self):
        return {self.pick("123"): self.rarely_odd(self.api_node()) for _ in range(1 + self.below(3))}

    def api_node(self):
        inputs = {self.pick(NAMES): self.rarely_odd(self.link()) for _ in range(self.below(5))}
        node = {"class_type": self.rarely_odd(self.pick(KINDS)), "inputs": self.rarely_odd(inputs)}
        return {**node, "_meta": self.value()} if self.below(4) == 3 else node

    def level(self):
        nodes = [self.rarely_odd(self.ui_node(number)) for number in range(self.below(5))]
        links = [self.rarely_odd(self.ends()) for _ in range(self.below(5))]
        return {"nodes": nodes, "links": self.rarely_odd(links)}

    def ends(self):
        places = [self.pick((1, 0, 1, 2, 0, 3, 4, -10, -20, 1.0, 10**30)) for _ in range(4 + self.below(3))]
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return dict(zip(keys, places, strict=False)) if self.below(3) == 2 else places

    def ui_node(self, number):
        # Rarely that of another: two nodes of one id are refused before anything else is looked at.
        own = self.below(5) if self.below(8) == 7 else number
        node = {"id": self.rarely_odd(own), "type": self.rarely_odd(self.pick(KINDS + INNER))}
        for name in ("inputs", "outputs"):
            if self.below(2):
                node[name] = self.rarely_odd([self.rarely_odd(self.slot()) for _ in range(self.below(4))])
        for name in ("widgets_values", "properties", "title", "pos", "flags"):
            if self.below(3) == 2:
                node[name] = self.value()
        return {**node, "mode": self.rarely_odd(self.pick((0, 2, 4)))}

    def slot(self):
        slot = {"name": self.rarely_odd(self.pick(NAMES)), "link": self.rarely_odd(1 + self.below(4))}
        if self.below(2):
            slot["widget"] = self.rarely_odd({"name": slot["name"]})
        return {**slot, "type": self.rarely_odd("IMAGE"), "links": [self.below(4)]}

    def ui(self):
        graph = self.level()
        if self.below(2):
            inner = [self.rarely_odd({"id": self.pick("gh"), **self.level()}) for _ in range(1 + self.below(2))]
            for entry in inner:
                if isinstance(entry, dict) and self.below(2):
                    entry |= {side: [self.rarely_odd(self.slot())] for side in ("inputs", "outputs")}
            graph["definitions"] = self.rarely_odd({"subgraphs": self.rarely_odd(inner)})
        if self.below(4) == 3:
            graph["extra"] = self.pick(({"groupNodes": self.rarely_odd({"k": self.group()})}, self.value()))
        return graph

    def grouped(self):
        """A group node between one that makes a picture and one that shows it."""
        names = [self.pick(NAMES) for _ in range(self.below(4))]
        sockets = [{"name": name, "type": "IMAGE", "link": self.pick((1, None))} for name in names]
        values = [self.value(depth=1) for _ in range(self.below(9))]
        group = {"id": 2, "type": self.pick(("workflow>k", "workflow/k")), "inputs": sockets, "widgets_values": values}
        takers = [{"name": "source", "type": "*", "link": 2}]
        nodes = [{"id": 1, "type": "EmptyImage"}, group, {"id": 3, "type": "PreviewAny", "inputs": takers}]
        links = [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, self.below(3), 3, 0, "IMAGE"]]
        groups = {"k": self.group()}
        return {"nodes": nodes, "links": links, "extra": self.rarely_odd({"groupNodes": groups})}

    def group(self):
        """What a group node holds: few nodes that are not known, which would keep it closed."""
        kinds = ("LoadImage", "EmptyImage", "PreviewAny", "ImageResizeKJ", "PrimitiveNode", "Reroute", "SetNode")
        nodes = [{"type": self.pick(kinds), "inputs": [self.socket() for _ in range(3)]} for _ in range(3)]
        for node in nodes:
            node["outputs"] = [{"name": self.pick(NAMES), "type": self.pick(("IMAGE", "*"))}] * 2
            if self.below(4) == 3:
                node[self.pick(("type", "inputs", "outputs", "widgets_values", "title", "mode"))] = self.value()
        made = {"nodes": nodes, "links": [self.group_link() for _ in range(self.below(5))]}
        if self.below(2):
            made["external"] = [[self.below(3), self.below(2), self.pick(("IMAGE", "*", None))]]
        if self.below(2):
            chosen = {"name": self.pick(NAMES), "visible": self.pick((True, False, None, 0))}
            sides = {"input": {self.pick(NAMES): chosen}, "output": {self.pick("01"): self.rarely_odd(chosen)}}
            made["config"] = {self.pick("012"): sides}
        if self.below(4) == 3:
            made[self.pick(tuple(made))] = self.value()
        return made

    def socket(self):
        name = self.pick(NAMES)
        widget = {"widget": {"name": name}} if self.below(2) else {}
        return {"name": name, "type": self.pick(("IMAGE", "INT", "*")), **widget}

    def group_link(self):
        ends = [self.pick((0, 1, 2, None)), self.below(2), self.below(3), self.below(3)]
        return [*ends, self.below(9), self.pick(("IMAGE", "INT", "COMBO"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    before = get_host()
    folder = tmp_path_factory.mktemp("fuzz")
    set_host(StandaloneHost(models=folder, inputs=folder, outputs=folder / "out", device="cpu"))
    yield folder
    set_host(before)


def read(path):
    with limited(path):
        try:
            prompt = load(path, CLASSES)
            nodes = check(prompt, CLASSES, get_host())
            json.dumps(as_api(prompt))
            assert nodes
        except ValueError as error:
            assert str(error)


@run
@given(data=st.binary(min_size=100, max_size=800))
@example(data=b"")
def test_graphs(data, folder):
    choices = Choices(data)
    graph = choices.api() if choices.below(2) else choices.ui()
    note(repr(graph))
    path = folder / "graph.json"
    path.write_text(json.dumps(graph))
    read(path)


@run
@given(data=st.binary(min_size=100, max_size=800))
def test_group_nodes(data, folder):
    graph = Choices(data).grouped()
    note(repr(graph))
    path = folder / "graph.json"
    path.write_text(json.dumps(graph))
    read(path)


@run
@given(name=st.sampled_from(sorted(WORKFLOWS)), data=st.binary(min_size=40, max_size=200))
def test_whole_workflows_with_odd_parts(name, data, folder):
    graph, choices = json.loads(WORKFLOWS[name]), Choices(data)
    for _ in range(1 + choices.below(4)):
        change(graph, choices)
    path = folder / "graph.json"
    path.write_text(json.dumps(graph))
    read(path)


def change(graph, choices):
    """Replace, take out or double one part, a few levels down."""
    part = graph["nodes"] if choices.below(4) and isinstance(graph.get("nodes"), list) else graph
    for _ in range(6):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        if not keys:
            return
        # Two bytes: workflows have more than 256 links.
        key = keys[(choices.below(256) * 256 + choices.below(256)) % len(keys)]
        if not isinstance(part[key], dict | list) or choices.below(3) == 0:
            break
        part = part[key]
    else:
        return
    match choices.below(4):
        case 0:
            del part[key]
        case 1 if isinstance(part, list):
            part.append(part[key])
        case _:
            part[key] = choices.value()


@run
@given(
    name=st.sampled_from(sorted(WORKFLOWS)), at=st.floats(0, 1), new=st.binary(max_size=9), length=st.integers(0, 64)
)
def test_damaged_workflow_files(name, at, new, length, folder):
    data = WORKFLOWS[name]
    place = int(at * len(data))
    path = folder / "graph.json"
    path.write_bytes(data[:place] + new + data[place + length :])
    read(path)
