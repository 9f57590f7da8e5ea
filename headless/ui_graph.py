"""A workflow as ComfyUI's editor saves it -> nodes with named inputs.

What only exists in the editor disappears: subgraphs, reroutes, Get and Set nodes, primitives, notes, muted and
bypassed nodes. Links are followed back to the node that really makes the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .widgets import inputs_of, values_by_name

MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20
NOTES = ("Note", "MarkdownNote")
REROUTES = ("Reroute", "Reroute (rgthree)")
EDITOR_ONLY = (*REROUTES, "PrimitiveNode", "GetNode", "SetNode", *NOTES)


@dataclass
class Converted:
    """A node that runs. inputs: name -> value, or (node id, slot) for a link."""

    id: str
    type: str
    title: str
    inputs: dict[str, object] = field(default_factory=dict)
    pack: str = ""


@dataclass(frozen=True)
class Literal:
    """A link that ends in a value, not in a node."""

    value: object


@dataclass(frozen=True)
class Untouched:
    """A link to an input of the subgraph that is not connected and holds no value: the node keeps its own value."""


Source = tuple[str, int] | Literal | Untouched | None


class Scope:
    """One level of the workflow: the top, or the inside of one use of a subgraph."""

    def __init__(
        self, graph: Mapping[str, object], subgraphs: Mapping[str, Mapping[str, object]], outer: Outer | None = None
    ) -> None:
        self.outer = outer
        self.subgraphs = subgraphs
        self.prefix = "" if outer is None else f"{outer.scope.prefix}{outer.node['id']}:"
        self.nodes: dict[object, Mapping[str, object]] = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(_links(graph.get("links", ())))
        self.inner: dict[object, Scope] = {
            key: Scope(subgraphs[node["type"]], subgraphs, Outer(self, node))
            for key, node in self.nodes.items()
            if node["type"] in subgraphs and node.get("mode", 0) not in (MUTED, BYPASSED)
        }

    def source(self, link: object) -> Source:
        """What the link with this id really carries."""
        if link is None or link not in self.links:
            return None
        origin, slot = self.links[link][:2]
        return self.output(origin, slot)

    def output(self, origin: object, slot: int) -> Source:
        """What output `slot` of node `origin` really is."""
        if origin == SUBGRAPH_INPUT:
            return self._outer_input(slot)
        node = self.nodes.get(origin)
        if node is None or node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            return self._bypassed(node, slot)
        if origin in self.inner:
            return self.inner[origin].result(slot)
        if node["type"] in (*REROUTES, "SetNode"):
            return self._first_input(node)
        if node["type"] == "GetNode":
            return self._variable(_saved_name(node))
        if node["type"] == "PrimitiveNode":
            return Literal((node.get("widgets_values") or [None])[0])
        return f"{self.prefix}{origin}", slot

    def result(self, slot: int) -> Source:
        """Output `slot` of the subgraph that this scope is the inside of."""
        for origin, origin_slot, target, target_slot in self.links.values():
            if target == SUBGRAPH_OUTPUT and target_slot == slot:
                return self.output(origin, origin_slot)
        return None

    def _first_input(self, node: Mapping[str, object]) -> Source:
        inputs = node.get("inputs") or [{}]
        return self.source(inputs[0].get("link"))

    def _outer_input(self, slot: int) -> Source:
        scope, node = self.outer.scope, self.outer.node
        inputs = node.get("inputs") or []
        if slot >= len(inputs):
            return Untouched()
        if inputs[slot].get("link") is not None:
            return scope.source(inputs[slot]["link"])
        widgets = [i for i, entry in enumerate(inputs) if entry.get("widget")]
        values = node.get("widgets_values") or []
        if slot in widgets and widgets.index(slot) < len(values):
            return Literal(values[widgets.index(slot)])
        return Untouched()

    def _bypassed(self, node: Mapping[str, object], slot: int) -> Source:
        outputs, inputs = node.get("outputs") or [], node.get("inputs") or []
        kind = outputs[slot]["type"] if slot < len(outputs) else None
        for entry in [*inputs[slot : slot + 1], *inputs]:
            unlinked_widget = entry.get("widget") and entry.get("link") is None
            if entry.get("type") == kind and not unlinked_widget:
                return self.source(entry.get("link"))
        return None

    def _variable(self, name: object) -> Source:
        for node in self.nodes.values():
            if node["type"] == "SetNode" and _saved_name(node) == name:
                return self._first_input(node)
        return None if self.outer is None else self.outer.scope._variable(name)


@dataclass(frozen=True)
class Outer:
    """Where a subgraph is used."""

    scope: Scope
    node: Mapping[str, object]


def convert(workflow: Mapping[str, object], classes: Mapping[str, type]) -> list[Converted]:
    """All nodes that can run, subgraphs opened up. classes: node classes by name, for widget values by position."""
    definitions = (workflow.get("definitions") or {}).get("subgraphs", [])
    subgraphs = {entry["id"]: entry for entry in definitions}
    return list(_converted(Scope(workflow, subgraphs), classes))


def _converted(scope: Scope, classes: Mapping[str, type]) -> Iterator[Converted]:
    for key, node in scope.nodes.items():
        if key in scope.inner:
            yield from _converted(scope.inner[key], classes)
        elif node["type"] not in EDITOR_ONLY and node.get("mode", 0) not in (MUTED, BYPASSED):
            yield _node(scope, node, classes)


def _node(scope: Scope, node: Mapping[str, object], classes: Mapping[str, type]) -> Converted:
    properties = node.get("properties") or {}
    result = Converted(
        id=f"{scope.prefix}{node['id']}",
        type=node["type"],
        title=node.get("title", ""),
        pack=properties.get("cnr_id") or properties.get("aux_id") or "",
    )
    known = classes.get(node["type"])
    saved = node.get("widgets_values")
    if known is not None:
        result.inputs |= values_by_name(known, saved)
        if isinstance(saved, Mapping):
            declared = {entry.name for entry in inputs_of(known)}
            result.inputs |= {k: v for k, v in saved.items() if k not in declared and _is_plain(v)}
    elif isinstance(saved, Mapping):
        result.inputs |= saved
    for entry in node.get("inputs") or ():
        source = scope.source(entry.get("link"))
        if isinstance(source, Literal):
            result.inputs[entry["name"]] = source.value
        elif isinstance(source, Untouched):
            continue
        elif source is not None:
            result.inputs[entry["name"]] = source
        elif entry.get("link") is not None:
            # The link leads to nothing that runs (a muted node): the input is unconnected.
            result.inputs.pop(entry["name"], None)
    return result


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


def _saved_name(node: Mapping[str, object]) -> object:
    return (node.get("widgets_values") or [node.get("title")])[0]


def _links(links: object) -> Iterator[tuple[object, tuple[object, int, object, int]]]:
    """(link id, (origin, origin slot, target, target slot)) of both forms that links are saved in."""
    for link in links or ():
        if link is None:
            # Old editors left a null where a link was deleted.
            continue
        if isinstance(link, Mapping):
            ends = (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
            yield link["id"], ends
        else:
            yield link[0], (link[1], link[2], link[3], link[4])
