"""A workflow as ComfyUI's editor saves it -> nodes with named inputs.

What only exists in the editor disappears: subgraphs, reroutes, Get and Set nodes, primitives, notes, muted and
bypassed nodes. Links are followed back to the node that really makes the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from .everywhere import linked, sent_links
from .widgets import inputs_of, values_by_name

MUTED, BYPASSED = 2, 4
# Subgraphs in subgraphs multiply: a file of a few kilobytes can name more nodes than memory holds, or few nodes with as
# many inputs.
MOST_NODES, MOST_OPENED, DEEPEST = 20_000, 2_000_000, 50
WRAPPED = "__value__"
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


class Insides(Protocol):
    """What lies inside nodes that stand for several."""

    def of(self, node: Mapping[str, object], *, top: bool) -> Mapping[str, object] | None:
        """Nodes and links inside the node; None for one that stands for itself. top: whether it lies in no other."""
        ...


class Growth:
    """How much the nodes of a workflow stand for."""

    def __init__(self) -> None:
        self._nodes = self._values = 0

    def add(self, graph: Mapping[str, object]) -> None:
        """Count what one node stands for. Raises ValueError where it has become too much."""
        self._nodes += len(graph["nodes"])
        level = [graph["nodes"], graph.get("links")]
        while level and self._values <= MOST_OPENED:
            level = [part for value in level for part in parts(value)]
            self._values += len(level)
        if self._nodes > MOST_NODES or self._values > MOST_OPENED:
            raise ValueError(
                f"Its subgraphs and group nodes open up to more than {MOST_NODES} nodes or {MOST_OPENED} values; split "
                "the workflow."
            )


def parts(value: object) -> Iterable[object]:
    """The values that a JSON value is made of."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


class LoopError(Exception):
    """Subgraphs, or Set, Get or Reroute nodes, lead back to themselves."""


class Hop(NamedTuple):
    """A link that passes through a node of the editor: what it carries is made at output `slot` of `origin`."""

    scope: Scope
    origin: object
    slot: int


class Scope:
    """One level of the workflow: the top, or the inside of one use of a subgraph.

    switched: modes by full id ("263:249"), which hold in one use of a subgraph. Raises ValueError where subgraphs in
    subgraphs multiply to too much, LoopError where one contains itself.
    """

    def __init__(
        self,
        graph: Mapping[str, object],
        insides: Insides,
        switched: Mapping[str, int],
        outer: Outer | None = None,
    ) -> None:
        self.outer = outer
        self.growth: Growth = Growth() if outer is None else outer.scope.growth
        if outer is not None:
            self.growth.add(graph)
        self.switched = switched
        self.prefix = "" if outer is None else f"{outer.scope.prefix}{outer.node['id']}:"
        self.nodes: dict[object, Mapping[str, object]] = {node["id"]: node for node in graph["nodes"]}
        _no_id_twice(graph["nodes"])
        self.links = dict(_links(graph.get("links", ())))
        for place, ends in enumerate([*sent_links(graph.get("extra"), self.nodes, self.links, self._runs)]):
            self.links[f"sent {place}"] = ends
            self.nodes[ends[2]] = linked(self.nodes[ends[2]], ends[3], f"sent {place}")
        self.inner: dict[object, Scope] = {}
        self._known: dict[tuple[object, int], Source] = {}
        for key, node in self.nodes.items():
            if not isinstance(node["type"], str):
                raise TypeError(f"node {key} has the type {node['type']}")
            inside = None if self.mode(node) in (MUTED, BYPASSED) else insides.of(node, top=outer is None)
            if inside is not None:
                use = Outer(self, node)
                if use.depth > DEEPEST:
                    raise LoopError
                self.inner[key] = Scope(inside, insides, switched, use)

    def mode(self, node: Mapping[str, object]) -> object:
        """Whether this use of the node is muted or bypassed."""
        return self.switched.get(f"{self.prefix}{node['id']}", node.get("mode", 0))

    def _runs(self, key: object) -> bool:
        return key in self.nodes and self.mode(self.nodes[key]) not in (MUTED, BYPASSED)

    def source(self, link: object) -> Source:
        """What the link with this id really carries. What others have found on the way is not looked for again."""
        where = self._hop(link)
        passed: dict[tuple[str, object, int], Hop] = {}
        while isinstance(where, Hop):
            key = (where.scope.prefix, where.origin, where.slot)
            if key in passed:
                raise LoopError
            passed[key] = where
            place = (where.origin, where.slot)
            known = where.scope._known
            where = known[place] if place in known else where.scope.step(*place)
        for hop in passed.values():
            hop.scope._known[hop.origin, hop.slot] = where
        return where

    def _hop(self, link: object) -> Hop | None:
        return None if link is None or link not in self.links else Hop(self, *self.links[link][:2])

    def step(self, origin: object, slot: int) -> Hop | Source:
        """What output `slot` of node `origin` is, or where to look next."""
        if origin == SUBGRAPH_INPUT:
            return self._outer_input(slot)
        node = self.nodes.get(origin)
        if node is None or self.mode(node) == MUTED:
            return None
        if self.mode(node) == BYPASSED:
            return self._bypassed(node, slot)
        if origin in self.inner:
            return self.inner[origin].result(slot)
        if node["type"] in (*REROUTES, "SetNode"):
            return self._first_input(node)
        if node["type"] == "GetNode":
            return self._variable(_saved_name(node))
        if node["type"] == "PrimitiveNode":
            return Literal((node.get("widgets_values") or [None])[0])
        return f"{self.prefix}{node['id']}", slot

    def result(self, slot: int) -> Hop | None:
        """Output `slot` of the subgraph that this scope is the inside of."""
        return self._results.get(slot)

    @cached_property
    def _results(self) -> dict[int, Hop]:
        """By output, the first link of each."""
        ends = reversed(self.links.values())
        return {slot: Hop(self, origin, at) for origin, at, target, slot in ends if target == SUBGRAPH_OUTPUT}

    def _first_input(self, node: Mapping[str, object]) -> Hop | None:
        inputs = node.get("inputs") or [{}]
        return self._hop(inputs[0].get("link"))

    def _outer_input(self, slot: int) -> Hop | Source:
        scope, node = self.outer.scope, self.outer.node
        inputs = node.get("inputs") or []
        if slot >= len(inputs):
            return Untouched()
        if inputs[slot].get("link") is not None:
            return scope._hop(inputs[slot]["link"])
        widgets = [i for i, entry in enumerate(inputs) if entry.get("widget")]
        values = node.get("widgets_values") or []
        if slot in widgets and widgets.index(slot) < len(values):
            return Literal(values[widgets.index(slot)])
        return Untouched()

    def _bypassed(self, node: Mapping[str, object], slot: int) -> Hop | None:
        outputs, inputs = node.get("outputs") or [], node.get("inputs") or []
        kind = outputs[slot]["type"] if slot < len(outputs) else None
        for entry in [*inputs[slot : slot + 1], *inputs]:
            unlinked_widget = entry.get("widget") and entry.get("link") is None
            if entry.get("type") == kind and not unlinked_widget:
                return self._hop(entry.get("link"))
        return None

    def _variable(self, name: object) -> Hop | None:
        scope = self
        while scope is not None:
            if repr(name) in scope._set_nodes:
                return scope._first_input(scope._set_nodes[repr(name)])
            scope = None if scope.outer is None else scope.outer.scope
        return None

    @cached_property
    def _set_nodes(self) -> dict[str, Mapping[str, object]]:
        """By the name that they set, which may be any value, the first of each."""
        return {repr(_saved_name(node)): node for node in reversed(self.nodes.values()) if node["type"] == "SetNode"}


@dataclass(frozen=True)
class Outer:
    """Where a subgraph is used."""

    scope: Scope
    node: Mapping[str, object]

    @property
    def depth(self) -> int:
        """How many subgraphs lie around the inside of this one."""
        return self.scope.prefix.count(":") + 1


def convert(
    workflow: Mapping[str, object], insides: Insides, classes: Mapping[str, type], switched: Mapping[str, int]
) -> list[Converted]:
    """All nodes that can run, subgraphs and group nodes opened up.

    classes: node classes by name, for widget values by position. switched: modes of nodes inside others, by full id.
    """
    return list(_converted(Scope(workflow, insides, switched), classes))


def subgraphs_of(workflow: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """The definitions of the workflow's subgraphs, by the type of the nodes that use them."""
    definitions = (workflow.get("definitions") or {}).get("subgraphs") or ()
    return {entry["id"]: entry for entry in definitions}


def _converted(scope: Scope, classes: Mapping[str, type]) -> Iterator[Converted]:
    for key, node in scope.nodes.items():
        if key in scope.inner:
            yield from _converted(scope.inner[key], classes)
        elif node["type"] not in EDITOR_ONLY and scope.mode(node) not in (MUTED, BYPASSED):
            yield _node(scope, node, classes)


def _node(scope: Scope, node: Mapping[str, object], classes: Mapping[str, type]) -> Converted:
    properties = node.get("properties") or {}
    result = Converted(
        id=f"{scope.prefix}{node['id']}",
        type=node["type"],
        title=str(node.get("title") or ""),
        pack=str(properties.get("cnr_id") or properties.get("aux_id") or ""),
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
    # The editor hands a list on in this wrapping, because a bare list is a link.
    result.inputs = {str(k): {WRAPPED: v} if isinstance(v, list) else v for k, v in result.inputs.items()}
    for entry in node.get("inputs") or ():
        source, name = scope.source(entry.get("link")), str(entry["name"])
        if isinstance(source, Literal):
            result.inputs[name] = source.value
        elif isinstance(source, Untouched):
            continue
        elif source is not None:
            result.inputs[name] = source
        elif entry.get("link") is not None:
            # The link leads to nothing that runs (a muted node): the input is unconnected.
            result.inputs.pop(name, None)
    return result


def _no_id_twice(nodes: Sequence[Mapping[str, object]]) -> None:
    """Raises ValueError naming two nodes that links cannot tell apart."""
    seen: dict[str, Mapping[str, object]] = {}
    for node in nodes:
        other = seen.setdefault(str(node["id"]), node)
        if other is not node:
            raise ValueError(
                f"Two nodes of the workflow, {other.get('type')} and {node.get('type')}, have the id {node['id']}: "
                "open it in ComfyUI, connect what is not connected, and save it again."
            )


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
            yield link["id"], _ends(link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        else:
            yield link[0], _ends(*link[1:5])


def _ends(origin: object, slot: object, target: object, target_slot: object) -> tuple[object, int, object, int]:
    """Some editors save output numbers as 0.0."""
    return origin, as_slot(slot), target, as_slot(target_slot)


def as_slot(value: object) -> int:
    """The number of an output. Raises TypeError if the value is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise TypeError(f"{value!r} is no number of an output")
    return int(value)
