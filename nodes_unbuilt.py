"""Nodes of the original that no family builds yet: their interface is there, so that saved graphs open and keep their
values, and one that a result depends on is refused before anything runs.

nodes_unbuilt.json holds the interfaces. A node that a family registers is never taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .node_tips import with_tips

TABLE = Path(__file__).with_name("nodes_unbuilt.json")
UNUSED = "Kept as it was saved: the node is not built in this version"

Interface = Mapping[str, object]


def unbuilt(registered: Mapping[str, type]) -> tuple[dict[str, type], dict[str, str]]:
    """Classes and display names, by class name, of the original's nodes that are not among `registered`."""
    missing = {
        name: interface
        for name, interface in json.loads(TABLE.read_text(encoding="utf-8")).items()
        if name not in registered
    }
    classes = {name: _node_class(name, interface) for name, interface in missing.items()}
    return classes, {name: interface["display_name"] for name, interface in missing.items()}


class UnbuiltNode:
    """What such nodes have in common; `_node_class` adds the interface of one."""

    interface: Interface
    refusal: str

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, object]]:
        sections: dict[str, dict[str, object]] = {
            section: {name: (kind, *options) for name, kind, *options in cls.interface.get(section, ())}
            for section in ("required", "optional")
        }
        return with_tips(sections, UNUSED) | {"hidden": dict(cls.interface.get("hidden", {}))}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: object = None) -> bool | str:
        """Refuses when the graph is queued, which ComfyUI asks only of nodes that an output depends on.

        input_types: ComfyUI's name for the types of what is linked. A parameter of that name makes it report the
        refusal once, instead of once for every input.
        """
        return cls.refusal

    def run(self, **inputs: object) -> tuple[None, ...]:
        """For hosts that run a node without asking VALIDATE_INPUTS."""
        raise ValueError(self.refusal)


def _node_class(name: str, interface: Interface) -> type:
    kinds, names = zip(*interface["outputs"], strict=True)
    refusal = _refusal(interface)
    members = {
        "__doc__": refusal,
        "DESCRIPTION": refusal,
        "DISPLAY_NAME": interface["display_name"],
        "CATEGORY": interface["category"],
        "FUNCTION": interface["function"],
        "RETURN_TYPES": kinds,
        "RETURN_NAMES": names,
        "DEPRECATED": interface.get("deprecated", False),
        "EXPERIMENTAL": interface.get("experimental", False),
        "interface": interface,
        "refusal": refusal,
        interface["function"]: UnbuiltNode.run,
    }
    return type(name, (UnbuiltNode,), members)


def _refusal(interface: Interface) -> str:
    title = interface["display_name"]
    instead = f", and {interface['instead']}" if "instead" in interface else ""
    return f"'{title}' is not built in this version: disconnect or bypass it{instead}."
