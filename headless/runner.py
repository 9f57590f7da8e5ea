"""Runs a prompt: only what its outputs need, everything once."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .graph import Link, Node, Prompt, as_api
from .packs import pack_of
from .widgets import Input, checked, inputs_of

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

Outputs = tuple[object, ...]


class Runner:
    """Executes nodes of `classes` (name -> node class, ComfyUI's V1 form) and keeps their outputs for the run."""

    def __init__(self, prompt: Prompt, classes: Mapping[str, type], host: Host) -> None:
        self._prompt = prompt
        self._classes = classes
        self._host = host
        self._signatures: dict[str, str] = {}
        self._results: dict[str, Outputs] = {}
        self._shown: list[dict[str, object]] = []

    def run(self) -> list[dict[str, object]]:
        """Execute all output nodes; returns what they show (`ui`), in order.

        Everything is checked before the first node runs. Raises ValueError for a node that is unknown or has wrong
        inputs, and whatever a node raises.
        """
        outputs = [node for node in self._prompt.nodes.values() if self._is_output(node)]
        if not outputs:
            unknown = [f"{n.label} of {pack_of(n.type, n.pack)}" for n in self._unknown_ends()]
            known = f" that is known here, only {', '.join(unknown)}" if unknown else ""
            raise ValueError(f"The workflow has no node that saves or shows a result{known}: add VHS_VideoCombine.")
        needed: dict[str, Node] = {}
        for node in outputs:
            self._collect(node, needed, ())
        for node in needed.values():
            self._check(node)
        for node in needed.values():
            self._execute(node)
        return self._shown

    def _unknown_ends(self) -> list[Node]:
        """Unknown nodes whose outputs nobody takes: they may be what saves the result."""
        nodes = self._prompt.nodes.values()
        used = {value.node for node in nodes for value in node.inputs.values() if isinstance(value, Link)}
        return [node for node in nodes if node.type not in self._classes and node.id not in used]

    def _is_output(self, node: Node) -> bool:
        return bool(getattr(self._classes.get(node.type), "OUTPUT_NODE", False))

    def _collect(self, node: Node, needed: dict[str, Node], path: tuple[str, ...]) -> None:
        """Add the node and all that it needs, in the order in which they can run."""
        if node.id in needed:
            return
        if node.id in path:
            raise ValueError(f"The workflow has a loop through {node.label}; cut one of its links.")
        if node.type not in self._classes:
            raise ValueError(
                f"The workflow needs the node '{node.type}' (#{node.id}) of {pack_of(node.type, node.pack)}, which "
                "runs in ComfyUI only: bypass it with --bypass, or run the workflow there."
            )
        for value in node.inputs.values():
            if isinstance(value, Link):
                if value.node not in self._prompt.nodes:
                    raise ValueError(f"{node.label} is linked to node {value.node}, which is not in the workflow.")
                self._collect(self._prompt.nodes[value.node], needed, (*path, node.id))
        needed[node.id] = node

    def _check(self, node: Node) -> None:
        cls = self._classes[node.type]
        for entry in inputs_of(cls):
            self._check_input(node, entry)
        validate = getattr(cls, "VALIDATE_INPUTS", None)
        if validate is None:
            return
        parameters = inspect.signature(validate).parameters.values()
        given = {p.name: node.inputs.get(p.name, p.default) for p in parameters}
        # A value that another node will make is not known yet, and an absent one without a default cannot be judged.
        if not any(isinstance(value, Link) or value is inspect.Parameter.empty for value in given.values()):
            verdict = validate(**given)
            if verdict is not True:
                raise ValueError(f"{node.label}: {verdict}")

    def _check_input(self, node: Node, entry: Input) -> None:
        value = node.inputs.get(entry.name)
        if isinstance(value, Link):
            self._check_link(node, entry, value)
            return
        if value is None and not entry.is_widget:
            if entry.required:
                raise ValueError(f"{node.label}: the input '{entry.name}' is not connected.")
            return
        if entry.name in node.inputs:
            node.inputs[entry.name] = checked(entry, value, node.label)
        elif entry.required:
            node.inputs[entry.name] = checked(entry, entry.default, node.label)

    def _check_link(self, node: Node, entry: Input, link: Link) -> None:
        maker = self._prompt.nodes[link.node]
        made = self._classes[maker.type].RETURN_TYPES
        if link.slot >= len(made):
            raise ValueError(
                f"{maker.label} has no output {link.slot}; the workflow was saved with another version of it."
            )
        if not _fits(made[link.slot], entry.kind):
            raise ValueError(
                f"{node.label}: '{entry.name}' takes {entry.kind}, but is linked to {made[link.slot]} of {maker.label}."
            )

    def _execute(self, node: Node) -> None:
        self._host.check_cancelled()
        signature = self._signature(node)
        self._signatures[node.id] = signature
        if signature in self._results and not self._is_output(node):
            return
        log.info("Running %s.", node.label)
        cls = self._classes[node.type]
        arguments = {name: self._argument(value) for name, value in node.inputs.items()}
        returned = getattr(cls(), cls.FUNCTION)(**self._accepted(cls, node, arguments))
        if isinstance(returned, dict):
            self._shown.append(returned.get("ui", {}))
            returned = returned.get("result", ())
        self._results[signature] = tuple(returned or ())

    def _argument(self, value: object) -> object:
        if not isinstance(value, Link):
            return value
        return self._results[self._signatures[value.node]][value.slot]

    def _accepted(self, cls: type, node: Node, arguments: dict[str, object]) -> dict[str, object]:
        declared = {entry.name for entry in inputs_of(cls)}
        takes_all = getattr(cls, "ACCEPTS_ALL", False)
        chosen = {name: value for name, value in arguments.items() if takes_all or name in declared}
        hidden = {
            "UNIQUE_ID": node.id,
            "PROMPT": as_api(self._prompt),
            "EXTRA_PNGINFO": {"workflow": self._prompt.workflow} if self._prompt.workflow else {},
        }
        for name, kind in cls.INPUT_TYPES().get("hidden", {}).items():
            if kind in hidden:
                chosen[name] = hidden[kind]
        return chosen

    def _signature(self, node: Node) -> str:
        """Equal for two nodes that must give the same result."""
        inputs = {
            name: ["link", self._signatures[value.node], value.slot] if isinstance(value, Link) else ["value", value]
            for name, value in sorted(node.inputs.items())
        }
        text = json.dumps([node.type, inputs], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


def _fits(made: object, wanted: object) -> bool:
    """Whether an output type may go to an input type: "*" is any, "A,B" is either, and a whole number is a number."""
    if not isinstance(made, str) or not isinstance(wanted, str) or "*" in (made, wanted):
        return True
    makes, takes = set(made.split(",")), set(wanted.split(","))
    return bool(makes & takes) or ("INT" in makes and "FLOAT" in takes)
