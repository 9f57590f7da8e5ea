"""Writes graphs as ComfyUI's editor saves them, from the interfaces of the nodes: links by name, places by column."""

import uuid
from dataclasses import dataclass, field

from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.widgets import SEEDS, UPLOADS, inputs_of

PACK = "comfyui-wanvideo-aligned"
WIDTH, GAP, TITLE = 340, 50, 30
SLOT, WIDGET, TEXT = 20, 26, 90
NOTE = WIDTH + 100
# A table of text, in the last column.
WIDER = {"PreviewAny": 800}
# What a letter of a file's name takes, and what stands beside it: a shorter field cuts its end off.
LETTER, BESIDE = 6.2, 100
# Below the node whose result they take.
STACKED = {"CreateVideo", "SaveVideo"}
# What is seen first: the note in the upper left corner, at a size that can be read. The demo fits into 1600x900; shown
# whole on such a screen, larger graphs were boxes without text.
VIEW = {"scale": 0.62, "offset": [30, 140]}
# What a node shows below its widgets.
PICTURES = {"LoadImage": 320, "SaveVideo": 320, "LoadAudio": 60, "PreviewImage": 220, "PreviewAny": 500}


@dataclass
class Made:
    """A node of a graph under construction. inputs: values, nodes (their first output) or (node, output name)."""

    id: int
    type: str
    inputs: dict
    title: str = ""
    targets: list = field(default_factory=list)

    @property
    def cls(self):
        return NODE_CLASS_MAPPINGS.get(self.type) or STAND_INS[self.type]

    @property
    def outputs(self):
        kinds = self.cls.RETURN_TYPES
        return list(zip(getattr(self.cls, "RETURN_NAMES", kinds), kinds, strict=True))

    @property
    def sockets(self):
        linked = {name for name, value in self.inputs.items() if isinstance(value, (Made, tuple))}
        return [entry for entry in inputs_of(self.cls) if not entry.is_widget or entry.name in linked]

    @property
    def widgets(self):
        return [entry for entry in inputs_of(self.cls) if entry.is_widget]

    @property
    def width(self):
        lists = [self.inputs.get(entry.name) for entry in self.widgets if isinstance(entry.kind, list)]
        longest = max((len(value) for value in lists if isinstance(value, str)), default=0)
        return max(WIDER.get(self.type, WIDTH), round(LETTER * longest) + BESIDE)

    @property
    def height(self):
        texts = sum(bool(entry.options.get("multiline")) for entry in self.widgets)
        seeds = sum(entry.name in SEEDS for entry in self.widgets)
        slots = max(len(self.sockets), len(self.outputs))
        shown = PICTURES.get(self.type, 0)
        return 20 + SLOT * slots + WIDGET * (len(self.widgets) + seeds) + TEXT * texts + shown


class Graph:
    """Nodes in the order in which they are added; `saved` gives the file."""

    def __init__(self, name, note):
        self.name, self.note, self.nodes = name, note, []

    def add(self, kind, /, title="", **inputs):
        node = Made(len(self.nodes) + 2, kind, inputs, title)
        unknown = set(inputs) - {entry.name for entry in inputs_of(node.cls)}
        assert not unknown, f"{kind} has no {unknown}"
        self.nodes.append(node)
        return node

    def saved(self):
        links = self._links()
        places = self._places(links)
        nodes = [self._note(), *(_saved_node(node, links, *places[node.id]) for node in self.nodes)]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": len(links),
            "nodes": [{**node, "order": order} for order, node in enumerate(nodes)],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {"ds": VIEW},
            "version": 0.4,
        }

    def _links(self):
        links = []
        for node in self.nodes:
            for slot, entry in enumerate(node.sockets):
                value = node.inputs.get(entry.name)
                if not isinstance(value, (Made, tuple)):
                    continue
                maker, name = value if isinstance(value, tuple) else (value, value.outputs[0][0])
                output = [label for label, _ in maker.outputs].index(name)
                links.append([len(links) + 1, maker.id, output, node.id, slot, maker.outputs[output][1]])
        return links

    def _places(self, links):
        """(position, width) of nodes: makers are left of takers, each in the column with most room.

        Those that write the video stand below the node whose result they take.
        """
        takers = {node.id: [link[3] for link in links if link[1] == node.id] for node in self.nodes}
        makers = {node.id: [link[1] for link in links if link[3] == node.id] for node in self.nodes}
        step = {node.id: node.type not in STACKED for node in self.nodes}

        def last(key):
            return min((last(taker) - step[taker] for taker in takers[key]), default=0)

        first_of_all = min(map(last, takers))
        columns, filled, tops, widths = {}, {}, {}, {}
        for node in self.nodes:
            earliest = max((columns[maker] + step[node.id] for maker in makers[node.id]), default=first_of_all)
            column = min(range(last(node.id), earliest - 1, -1), key=lambda place: filled.get(place, 0))
            columns[node.id], tops[node.id] = column, filled.get(column, 0)
            widths[column] = max(widths.get(column, 0), node.width)
            filled[column] = tops[node.id] + node.height + TITLE + GAP
        left = {column: NOTE + GAP + sum(w + GAP for c, w in widths.items() if c < column) for column in widths}
        return {key: ([left[column], tops[key]], widths[column]) for key, column in columns.items()}

    def _note(self):
        return {
            "id": 1, "type": "MarkdownNote", "pos": [0, 0], "size": [NOTE, 420], "flags": {}, "mode": 0,
            "inputs": [], "outputs": [], "title": "Start here", "properties": {}, "widgets_values": [self.note],
            "color": "#432", "bgcolor": "#653",
        }  # fmt: skip


def _saved_node(node, links, place, width):
    ours = node.type in NODE_CLASS_MAPPINGS
    into = {link[4]: link[0] for link in links if link[3] == node.id}
    inputs = []
    for slot, entry in enumerate(node.sockets):
        kind = "COMBO" if isinstance(entry.kind, list) else entry.kind
        shape = {} if entry.required else {"shape": 7}
        widget = {"widget": {"name": entry.name}} if entry.is_widget else {}
        inputs.append({"name": entry.name, "type": kind, "link": into.get(slot), **shape, **widget})
    outputs = [
        {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [node.id, slot]]}
        for slot, (name, kind) in enumerate(node.outputs)
    ]
    return {
        "id": node.id, "type": node.type, "pos": place, "size": [width, node.height], "flags": {}, "mode": 0,
        "inputs": inputs, "outputs": outputs, **({"title": node.title} if node.title else {}),
        "properties": {"Node name for S&R": node.type, "cnr_id": PACK if ours else "comfy-core"},
        "widgets_values": _values(node),
    }  # fmt: skip


def _values(node):
    values = []
    for entry in node.widgets:
        value = node.inputs.get(entry.name, entry.default)
        values.append(entry.default if isinstance(value, (Made, tuple)) else value)
        if entry.name in SEEDS:
            values.append("fixed")
        if any(entry.options.get(upload) for upload in UPLOADS[:1]):
            values.append("image")
    return values
