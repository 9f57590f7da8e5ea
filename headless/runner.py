"""Runs a prompt: only what its outputs need, everything once."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .check import check, is_output
from .graph import Link, Node, Prompt, as_api
from .widgets import inputs_of

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

        Everything is checked before the first node runs. Raises GraphError for all that is wrong, and whatever a node
        raises.
        """
        for node in check(self._prompt, self._classes, self._host):
            self._execute(node)
        return self._shown

    def _execute(self, node: Node) -> None:
        self._host.check_cancelled()
        signature = self._signature(node)
        self._signatures[node.id] = signature
        if signature in self._results and not is_output(node, self._classes):
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
