"""Group nodes: several nodes that ComfyUI's editor drew as one, before it had subgraphs.

The file keeps what lies inside: nodes, which go by their place in the list, and links. What the group node shows
of it (names of inputs, order of values and outputs) follows from the interfaces of the nodes inside. Facts: ComfyUI's
front end 1.15 to 1.58, src/extensions/core/groupNode.ts. Versions of it lose some links (1.16 to 1.27 those through
reroutes inside, and those to widgets where older versions made the group): here all are followed as they are drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .ui_graph import EDITOR_ONLY, SUBGRAPH_INPUT, SUBGRAPH_OUTPUT, Growth, as_slot, subgraphs_of
from .widgets import Input, inputs_of, positional_values, values_by_name

log = logging.getLogger("wanvideo")

# How the types of group nodes begin, in old graphs and in newer ones.
PREFIXES = ("workflow/", "workflow>")


def is_group(node_type: str) -> bool:
    """Whether nodes of this type are group nodes."""
    return node_type.startswith(PREFIXES)


def _label(node: Mapping[str, object]) -> str:
    return f"{node.get('title') or node['type']} (#{node['id']})"


class Insides:
    """What lies inside the nodes of a workflow that stand for several: subgraphs and group nodes.

    classes: node classes by name.
    """

    def __init__(self, workflow: Mapping[str, object], classes: Mapping[str, type]) -> None:
        self._workflow, self._classes = workflow, classes
        self._subgraphs = subgraphs_of(workflow)
        self._groups: dict[str, _Group | None] = {}
        # By id: each use of a group has values of its own.
        self._uses: dict[object, Mapping[str, object] | None] = {}
        self._growth = Growth()

    def of(self, node: Mapping[str, object], *, top: bool) -> Mapping[str, object] | None:
        """Nodes and links, as a subgraph has them; None for nodes that stand for themselves, or that stay closed.

        top: whether the node lies in no other one; the editor opens no group node elsewhere. Raises ValueError if what
        a group node holds is damaged or too much.
        """
        if not is_group(node["type"]) or not top:
            return self._subgraphs.get(node["type"])
        if node["id"] not in self._uses:
            try:
                group = self._group(node["type"])
                inside = None if group is None else group.opened(node)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{_label(node)}: what this group node holds is damaged ({error!r}); make it again in ComfyUI, or "
                    "bypass it."
                ) from error
            self._uses[node["id"]] = inside
            if inside is not None:
                self._growth.add(inside)
        return self._uses[node["id"]]

    def all_nodes(self) -> Iterator[Mapping[str, object]]:
        """All nodes that lie inside others."""
        groups = (self.of(node, top=True) for node in self._workflow["nodes"] if is_group(node["type"]))
        for inside in (*self._subgraphs.values(), *filter(None, groups)):
            yield from inside["nodes"]

    def _group(self, kind: str) -> _Group | None:
        if kind not in self._groups:
            closed = closed_because(kind, self._workflow, self._classes)
            self._groups[kind] = None if closed else _Group(_definition(kind, self._workflow), self._classes)
        return self._groups[kind]


def _definition(kind: str, workflow: Mapping[str, object]) -> Mapping[str, object] | None:
    groups = (workflow.get("extra") or {}).get("groupNodes") or {}
    return groups.get(kind[len(PREFIXES[0]) :])


def closed_because(kind: str, workflow: Mapping[str, object], classes: Mapping[str, type]) -> str:
    """Why the editor opens no group node of this type; "" if it does."""
    definition = _definition(kind, workflow)
    if definition is None:
        return "whose nodes are not in the file"
    known = {*classes, *EDITOR_ONLY}
    unknown = [node["type"] for node in definition["nodes"] if node["type"] not in known]
    return f"that holds nodes that are not known here ({', '.join(dict.fromkeys(unknown))})" if unknown else ""


class _Group:
    """A definition, and what a group node shows of it.

    shown: by the name that the group node gives it, a node inside (its place) and one of its inputs; also inputs that
    the user hid, which have names and values all the same. outputs: a node inside and one of its outputs, in order.
    """

    def __init__(self, definition: Mapping[str, object], classes: Mapping[str, type]) -> None:
        self.nodes: Sequence[Mapping[str, object]] = definition["nodes"]
        self.config = definition.get("config") or {}
        self.classes = classes
        # A link without an origin came from outside when the group was made.
        self.links = [_link(link, self.nodes) for link in definition["links"] if link[0] is not None]
        self.came_in = {link[2]: link[5] for link in reversed(definition["links"]) if link[0] is None and len(link) > 5}
        self.goes_out = {(place, slot): kind for place, slot, kind in definition.get("external") or ()}
        self.into: dict[int, dict[int, _Link]] = {}
        self.out_of: dict[int, dict[int, list[_Link]]] = {}
        for link in self.links:
            self.into.setdefault(link.target, {})[link.at] = link
            self.out_of.setdefault(link.origin, {}).setdefault(link.slot, []).append(link)
        self.shown: dict[str, tuple[int, Input]] = {}
        self.outputs: list[tuple[int, int]] = []
        self._named: dict[str, int] = {}
        self._show()
        self._saved = [self._saved_values(node) for node in self.nodes]

    def opened(self, node: Mapping[str, object]) -> dict[str, object]:
        """The nodes and links inside this group node, with its values."""
        values = self._values(node.get("widgets_values"))
        nodes = [self._inner(place, values.get(place, {})) for place in range(len(self.nodes))]
        links: list[tuple[int, int, int, int, int]] = []
        for link in self.links:
            nodes[link.target]["inputs"][link.at]["link"] = len(links)
            links.append((len(links), *link[:4]))
        for slot, outer in enumerate(node.get("inputs") or ()):
            if outer.get("link") is None:
                continue
            if outer["name"] not in self.shown:
                log.warning("%s shows no input '%s': what is linked to it is left out.", _label(node), outer["name"])
                continue
            place, entry = self.shown[outer["name"]]
            _socket(nodes[place], entry)["link"] = len(links)
            links.append((len(links), SUBGRAPH_INPUT, slot, place, 0))
        for number, (place, slot) in enumerate(self.outputs):
            links.append((len(links), place, slot, SUBGRAPH_OUTPUT, number))
        return {"nodes": nodes, "links": links}

    def _show(self) -> None:
        """Goes through the inputs in the editor's order, on which names and the order of values depend."""
        last: list[tuple[int, int, Input]] = []
        for place, node in enumerate(self.nodes):
            entries, outputs = self._interface(place, node)
            self.outputs += [(place, slot) for slot in range(outputs) if self._is_output(place, slot)]
            # Widgets that could be linked when the group was made stand behind everything else.
            sockets = [entry["name"] if entry.get("widget") else None for entry in node.get("inputs") or ()]
            widgets = [entry for entry in entries if entry.has_widget_type]
            others = [entry for entry in entries if not entry.has_widget_type]
            for entry in widgets:
                if entry.name not in sockets:
                    self.shown[self._name(place, entry)] = place, entry
            for slot, entry in enumerate(others):
                if slot not in self.into.get(place, {}):
                    self.shown[self._name(place, entry)] = place, entry
            # The editor sorts numbers of slots as texts: 10 stands before 9.
            with_socket = sorted((e for e in widgets if e.name in sockets), key=lambda e: str(sockets.index(e.name)))
            last += [(place, slot, entry) for slot, entry in enumerate(with_socket, len(others))]
        for place, slot, entry in last:
            if slot not in self.into.get(place, {}):
                self.shown[self._name(place, entry)] = place, entry

    def _interface(self, place: int, node: Mapping[str, object]) -> tuple[list[Input], int]:
        """Inputs, and how many outputs; none of nodes that are for the editor only."""
        cls = self.classes.get(node["type"])
        if cls is not None:
            return inputs_of(cls), len(cls.RETURN_TYPES)
        out_of = self.out_of.get(place, {})
        if node["type"] == "PrimitiveNode" and out_of:
            kind = out_of[0][0].kind
            return [Input("value", [] if kind == "COMBO" else kind, {"control_after_generate": True}, True)], 1
        # One that carries from node to node inside only is not shown.
        if node["type"] == "Reroute" and not (place in self.into and out_of and (place, 0) not in self.goes_out):
            kind = self._rerouted(place)
            return [Input(kind, kind, {"forceInput": True}, True)], 1
        return [], 0

    def _rerouted(self, place: int) -> str:
        """The type that a reroute carries."""
        if place in self.out_of:
            takers = [self.nodes[link.target]["inputs"][link.at]["type"] for link in self.out_of[place][0]]
            return str(next((kind for kind in takers if kind != "*"), "*"))
        if place in self.into:
            maker = self.into[place][0]
            return str(self.nodes[maker.origin]["outputs"][maker.slot]["type"])
        return str(self.came_in.get(place, self.goes_out.get((place, 0), "*")))

    def _is_output(self, place: int, slot: int) -> bool:
        visible = self._chosen(place, "output", slot).get("visible")
        if visible is not None:
            return bool(visible)
        return slot not in self.out_of.get(place, {}) or (place, slot) in self.goes_out

    def _chosen(self, place: int, side: str, slot: object) -> Mapping[str, object]:
        """What the user set for an input or output of a node inside: name, visible."""
        return ((self.config.get(str(place)) or {}).get(side) or {}).get(str(slot)) or {}

    def _name(self, place: int, entry: Input) -> str:
        """What the group node calls the input of the node inside: its own name, or one that no other input has."""
        node = self.nodes[place]
        labels = [socket.get("label") for socket in node.get("inputs") or () if socket["name"] == entry.name]
        own = [self._chosen(place, "input", entry.name).get("name"), *labels[:1], entry.name]
        key = name = str(next(text for text in own if text is not None))
        if (node["type"] == "PrimitiveNode" and node.get("title")) or key in self._named:
            prefix = node["type"] if node.get("title") is None else node["title"]
            key = name = f"{prefix} {entry.name}"
            if key in self._named:
                name = f"{prefix} {self._named[key]} {entry.name}"
        self._named[key] = self._named.get(key, 1) + 1
        return name

    def _values(self, saved: Sequence[object] | None) -> dict[int, dict[str, object]]:
        """What the widgets of the group node say, by the place of the node inside."""
        places, entries = zip(*self.shown.values(), strict=True) if self.shown else ((), ())
        values: dict[int, dict[str, object]] = {}
        for number, value in positional_values(entries, saved):
            values.setdefault(places[number], {})[entries[number].name] = value
        return values

    def _saved_values(self, node: Mapping[str, object]) -> object:
        """The values that the node inside has of its own; by name where they are known."""
        saved, cls = node.get("widgets_values"), self.classes.get(node["type"])
        if cls is None:
            return saved
        # VideoHelperSuite's are saved by name, with some that no class declares.
        return {**(saved if isinstance(saved, Mapping) else {}), **values_by_name(cls, saved)}

    def _inner(self, place: int, values: Mapping[str, object]) -> dict[str, object]:
        node, saved = self.nodes[place], self._saved[place]
        if node["type"] in self.classes:
            saved = {**saved, **values}
        elif values:
            saved = list(values.values())
        inputs = [{**entry, "link": None} for entry in node.get("inputs") or ()]
        return {**node, "id": place, "inputs": inputs, "widgets_values": saved}


class _Link(NamedTuple):
    """From output `slot` of the node at place `origin` to input `at` of the node at place `target`."""

    origin: int
    slot: int
    target: int
    at: int
    kind: object


def _link(link: Sequence[object], nodes: Sequence[object]) -> _Link:
    origin, slot, target, at = map(as_slot, link[:4])
    if min(origin, slot, target, at) < 0 or max(origin, target) >= len(nodes):
        raise IndexError(f"the link {link[:4]} of {len(nodes)} nodes")
    return _Link(origin, slot, target, at, link[5] if len(link) > 5 else None)


def _socket(node: Mapping[str, object], entry: Input) -> dict[str, object]:
    """The input of a node inside to which a link from outside goes."""
    for socket in node["inputs"]:
        if socket["name"] == entry.name or node["type"] == "Reroute":
            return socket
    node["inputs"].append({"name": entry.name, "type": entry.kind, "widget": {"name": entry.name}})
    return node["inputs"][-1]
