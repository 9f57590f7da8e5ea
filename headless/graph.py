"""A prompt: the nodes of a workflow with named inputs, ready to run, and edits of it.

`load` reads both forms that ComfyUI saves: the API form is a prompt already; the UI form is converted (ui_graph.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..saved_values import renamed_inputs
from .group_nodes import Insides
from .ui_graph import BYPASSED, MUTED, WRAPPED, LoopError, as_slot, convert, parts
from .widgets import Input, from_text, inputs_of

# As large as ComfyUI's server takes; a value of a byte or two in the file takes up to 200 in memory.
MOST_BYTES, MOST_VALUES = 100 * 2**20, 10**6
# Deeper values end in Python's recursion limit wherever they are written or compared.
DEEPEST_VALUE = 100


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
            inner = [node.label for node in self.nodes.values() if node.id.startswith(f"{name}:")]
            if inner:
                raise ValueError(f"Node {name} holds other nodes: name one of them, {', '.join(inner)}.")
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

    Nodes inside subgraphs are switched by title or class in every use of the subgraph, by full id ("263:249") in one.

    Raises ValueError if the file is no workflow, FileNotFoundError if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no workflow file {path}.")
    data = _posted(_json(path))
    if _is_ui(data):
        try:
            return _with_current_names(_from_ui(data, classes, {BYPASSED: bypass, MUTED: mute}), classes)
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path.name} is a damaged workflow ({error!r}); save it in ComfyUI again.") from error
        except LoopError as error:
            raise ValueError(f"Subgraphs, or Set, Get or Reroute nodes, of {path.name} form a loop; cut it.") from error
    if _is_api(data):
        if bypass or mute:
            raise ValueError(f"{path.name} is in API form, where nodes cannot be bypassed or muted; use the UI form.")
        return _with_current_names(_from_api(data), classes)
    raise ValueError(f"{path.name} is no workflow: save it in ComfyUI with 'Save' or 'Export (API)'.")


def _posted(data: object) -> object:
    """The workflow inside of what is posted to ComfyUI's server (`prompt`) or to a worker (`input`, `workflow`)."""
    while isinstance(data, dict) and not _is_ui(data) and not _is_api(data):
        data = next((data[key] for key in ("workflow", "prompt", "input") if key in data), None)
    return data


def _is_ui(data: object) -> bool:
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def _is_api(data: object) -> bool:
    return isinstance(data, dict) and any(isinstance(n, dict) and "class_type" in n for n in data.values())


def _with_current_names(prompt: Prompt, classes: Mapping[str, type]) -> Prompt:
    """The prompt, its inputs under the names that they have today."""
    for node in prompt.nodes.values():
        node.inputs = renamed_inputs(classes.get(node.type), node.inputs, node.label)
    return prompt


def _json(path: Path) -> object:
    """What the file holds; from bytes, so that byte order marks of all Unicode forms are understood."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES or sum(map(content.count, b",[{")) > MOST_VALUES:
        raise ValueError(
            f"{path.name} is no workflow: it is larger than {MOST_BYTES >> 20} MB, or holds more than {MOST_VALUES} "
            "values."
        )
    try:
        data = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{path.name} is no workflow: its values are nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is no workflow: it is not JSON ({error}).") from error
    level = [data]
    for _ in range(DEEPEST_VALUE):
        level = [v for entry in level for v in parts(entry)]
        if not level:
            return data
    raise ValueError(f"{path.name} is no workflow: its values are nested too deeply.")


def _from_api(data: Mapping[str, object]) -> Prompt:
    nodes, wrong = {}, []
    for key, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            wrong.append(f"Node #{key} has no class_type")
        elif not isinstance(entry.get("inputs"), dict):
            wrong.append(f"{entry['class_type']} (#{key}) has no inputs")
        else:
            meta = entry.get("_meta")
            title = str(meta.get("title") or "") if isinstance(meta, dict) else ""
            inputs = {name: _value(value) for name, value in entry["inputs"].items()}
            nodes[key] = Node(id=key, type=entry["class_type"], title=title, inputs=inputs)
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: save the workflow in ComfyUI again with 'Export (API)'.")
    # The API form is all that was saved: there is no editor's workflow to store in results.
    return Prompt(nodes, {})


def _value(value: object) -> object:
    """A link where the value is one. Other lists stay: they are refused only where a node declares the input."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return value
    try:
        return Link(value[0], as_slot(value[1]))
    except (TypeError, OverflowError):
        return value


def _from_ui(
    data: Mapping[str, object], classes: Mapping[str, type], switches: Mapping[int, Sequence[str]]
) -> Prompt:
    insides = Insides(data, classes)
    switched = {}
    for mode, names in switches.items():
        for name in names:
            switched |= _switch(data, insides, name, mode)
    nodes = {}
    for entry in convert(data, insides, classes, switched):
        inputs = {name: Link(*v) if isinstance(v, tuple) else v for name, v in entry.inputs.items()}
        nodes[entry.id] = Node(id=entry.id, type=entry.type, title=entry.title, inputs=inputs, pack=entry.pack)
    return Prompt(nodes, data)


def _switch(data: Mapping[str, object], insides: Insides, name: str, mode: int) -> dict[str, int]:
    """Sets the mode of the nodes of this id, title or class; returns it by full id for one inside a subgraph's use."""
    if ":" in name and _inside(data, insides, name.split(":")) is not None:
        return {name: mode}
    nodes = [node for node in data["nodes"] if name == str(node["id"])]
    if not nodes:
        every = (*data["nodes"], *insides.all_nodes())
        nodes = [node for node in every if name in (node.get("title"), node["type"])]
    if not nodes:
        raise ValueError(f"There is no node '{name}' in the workflow: give its id, title or class name.")
    for node in nodes:
        node["mode"] = mode
    return {}


def _inside(graph: Mapping[str, object], insides: Insides, path: Sequence[str]) -> Mapping[str, object] | None:
    """The node at the end of a path of ids, each but the last that of a node that stands for several."""
    node = None
    for position, key in enumerate(path):
        node = next((node for node in graph["nodes"] if str(node["id"]) == key), None)
        if node is None or position == len(path) - 1:
            return node
        graph = insides.of(node, top=position == 0) or {"nodes": ()}
    return node


def as_api(prompt: Prompt) -> dict[str, dict[str, object]]:
    """The prompt in ComfyUI's API form, as its server takes it."""
    return {
        node.id: {
            "class_type": node.type,
            "inputs": {k: _saved(v) for k, v in node.inputs.items()},
            "_meta": {"title": node.title},
        }
        for node in prompt.nodes.values()
    }


def _saved(value: object) -> object:
    if isinstance(value, Link):
        return list(value)
    return {WRAPPED: value} if isinstance(value, list) else value
