"""A prompt: the nodes of a workflow with named inputs, ready to run, and edits of it.

`load` reads both forms that ComfyUI saves: the API form is a prompt already; the UI form is converted (ui_graph.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .ui_graph import BYPASSED, MUTED, convert
from .widgets import Input, from_text, inputs_of


class Link(NamedTuple):
    """An input that takes output `slot` of node `node`."""

    node: str
    slot: int


@dataclass
class Node:
    """One node. inputs: name -> value or Link. pack: where the graph says the node comes from, "" if it does not."""

    id: str
    type: str
    title: str
    inputs: dict[str, object] = field(default_factory=dict)
    pack: str = ""

    @property
    def label(self) -> str:
        """How messages name the node."""
        return f"{self.title or self.type} (#{self.id})"


@dataclass
class Prompt:
    """Nodes by id, and the workflow they came from, which is stored in results."""

    nodes: dict[str, Node]
    workflow: Mapping[str, object]

    def find(self, name: str) -> Node:
        """The node with this id, title or class name.

        Raises ValueError if there is none, or several (naming their ids).
        """
        if name in self.nodes:
            return self.nodes[name]
        found = [node for node in self.nodes.values() if name in (node.title, node.type)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(f"There is no node '{name}' in the workflow: give its id, title or class name.")
        ids = ", ".join(node.id for node in found)
        raise ValueError(f"'{name}' names {len(found)} nodes of the workflow; give the id of one: {ids}.")

    def set(self, assignment: str, classes: Mapping[str, type]) -> None:
        """Apply NODE.INPUT=VALUE; the value is checked against the input's type.

        Raises ValueError if the node, the input or the value does not fit.
        """
        target, equals, text = assignment.partition("=")
        name, dot, input_name = target.rpartition(".")
        if not equals or not dot:
            raise ValueError(f"'{assignment}' is no assignment; write NODE.INPUT=VALUE.")
        node = self.find(name)
        if node.type not in classes:
            raise ValueError(f"The inputs of {node.label} are unknown, so '{input_name}' cannot be set.")
        entries = {entry.name: entry for entry in inputs_of(classes[node.type])}
        # VHS_VideoCombine's widgets that depend on the format are declared nowhere; their saved values tell the type.
        entries |= {n: Input(n, _kind(v), {}, False) for n, v in node.inputs.items() if n not in entries}
        if input_name not in entries:
            raise ValueError(f"{node.label} has no input '{input_name}'; it has: {', '.join(entries)}.")
        node.inputs[input_name] = from_text(entries[input_name], text, node.label)


def _kind(value: object) -> str:
    kinds = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}
    return kinds.get(type(value), "*")


def load(path: Path, classes: Mapping[str, type], *, bypass: Sequence[str] = (), mute: Sequence[str] = ()) -> Prompt:
    """Read a workflow file. bypass, mute: nodes to switch off, by id, title or class (UI form only).

    Nodes inside subgraphs are switched by title or class, in every use of the subgraph.

    Raises ValueError if the file is no workflow, FileNotFoundError if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no workflow file {path}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no workflow: it is not JSON ({error}).") from error
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        try:
            return _from_ui(data, classes, bypass, mute)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} is a damaged workflow ({error!r}); save it in ComfyUI again.") from error
        except RecursionError as error:
            raise ValueError(f"Subgraphs, or Set, Get or Reroute nodes, of {path.name} form a loop; cut it.") from error
    if isinstance(data, dict) and data and all(isinstance(n, dict) and "class_type" in n for n in data.values()):
        if bypass or mute:
            raise ValueError(f"{path.name} is in API form, where nodes cannot be bypassed or muted; use the UI form.")
        return _from_api(data)
    raise ValueError(f"{path.name} is no workflow: save it in ComfyUI with 'Save' or 'Export (API)'.")


def _from_api(data: Mapping[str, Mapping[str, object]]) -> Prompt:
    nodes = {}
    for key, entry in data.items():
        inputs = {name: _value(value) for name, value in entry.get("inputs", {}).items()}
        title = str(entry.get("_meta", {}).get("title", ""))
        nodes[key] = Node(id=key, type=str(entry["class_type"]), title=title, inputs=inputs)
    # The API form is all that was saved: there is no editor's workflow to store in results.
    return Prompt(nodes, {})


def _value(value: object) -> object:
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
    return Link(*value) if linked else value


def _from_ui(
    data: Mapping[str, object], classes: Mapping[str, type], bypass: Sequence[str], mute: Sequence[str]
) -> Prompt:
    data = json.loads(json.dumps(data))
    definitions = (data.get("definitions") or {}).get("subgraphs") or ()
    inside = [node for subgraph in definitions for node in subgraph["nodes"]]
    _switch(data["nodes"], inside, bypass, BYPASSED)
    _switch(data["nodes"], inside, mute, MUTED)
    nodes = {}
    for entry in convert(data, classes):
        inputs = {name: Link(*v) if isinstance(v, tuple) else v for name, v in entry.inputs.items()}
        nodes[entry.id] = Node(id=entry.id, type=entry.type, title=entry.title, inputs=inputs, pack=entry.pack)
    return Prompt(nodes, data)


def _switch(
    nodes: Sequence[dict[str, object]], inside: Sequence[dict[str, object]], names: Sequence[str], mode: int
) -> None:
    for name in names:
        found = [n for n in nodes if name == str(n["id"])]
        found = found or [n for n in (*nodes, *inside) if name in (n.get("title"), n["type"])]
        if not found:
            raise ValueError(f"There is no node '{name}' in the workflow: give its id, title or class name.")
        for node in found:
            node["mode"] = mode


def as_api(prompt: Prompt) -> dict[str, dict[str, object]]:
    """The prompt in ComfyUI's API form, as its server takes it."""
    return {
        node.id: {
            "class_type": node.type,
            "inputs": {k: list(v) if isinstance(v, Link) else v for k, v in node.inputs.items()},
            "_meta": {"title": node.title},
        }
        for node in prompt.nodes.values()
    }
