"""A workflow with its changes and folders: all that a process needs to run it. Picklable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..host import StandaloneHost

if TYPE_CHECKING:
    from .graph import Prompt

SomeHost = TypeVar("SomeHost", bound=StandaloneHost)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where models, inputs and results are; None is the folder's default. allowed: others that a workflow may name."""

    models: Path | None = None
    inputs: Path | None = None
    outputs: Path | None = None
    allowed: Sequence[Path] = ()

    def host(self, kind: type[SomeHost], device: str) -> SomeHost:
        """A host of this kind with these folders."""
        return kind(
            models=self.models, inputs=self.inputs, outputs=self.outputs, device=device, allowed=tuple(self.allowed)
        )

    def absolute(self) -> Folders:
        """The same for a process that works in another folder; defaults are those of this one."""
        host = self.host(StandaloneHost, "cpu")
        return Folders(
            models=host.models_dir("vae").parent.absolute(),
            inputs=host.input_dir().absolute(),
            outputs=host.output_dir().absolute(),
            allowed=[folder.absolute() for folder in self.allowed],
        )


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Changes to a workflow: NODE.INPUT=VALUE, nodes to pass through, nodes to leave out.

    change: made before the assignments; a function that can be pickled.
    """

    assignments: Sequence[str] = ()
    bypass: Sequence[str] = ()
    mute: Sequence[str] = ()
    change: Callable[[Prompt], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a workflow."""

    workflow: Path
    folders: Folders = Folders()
    edits: Edits = Edits()

    def prompt(self) -> tuple[Prompt, Mapping[str, type]]:
        """The changed graph, and the node classes. Raises GraphError for what is wrong with it."""
        from .graph import load

        classes = _classes()
        prompt = load(self.workflow, classes, bypass=self.edits.bypass, mute=self.edits.mute)
        if self.edits.change is not None:
            self.edits.change(prompt)
        for assignment in self.edits.assignments:
            prompt.set(assignment, classes)
        return prompt, classes

    def without(self) -> list[str]:
        """Labels of the nodes that results of the workflow are made with and that `edits` bypass."""
        from .check import is_output, needed
        from .graph import load

        if not self.edits.bypass:
            return []
        classes, there = _classes(), self.prompt()[0].nodes
        whole = needed(load(self.workflow, classes, mute=self.edits.mute), classes)
        return [node.label for node in whole if node.id not in there and not is_output(node, classes)]


def _classes() -> dict[str, type]:
    from .. import NODE_CLASS_MAPPINGS
    from .core_nodes import NODE_CLASS_MAPPINGS as STAND_INS

    return {**STAND_INS, **NODE_CLASS_MAPPINGS}


def lines(shown: Sequence[Mapping[str, object]]) -> list[str]:
    """What the outputs of a run show, a line each."""
    return [str(value) for entry in shown for values in entry.values() for value in values]


def show(shown: Sequence[str]) -> None:
    """Write lines to stdout; a character that stdout cannot show becomes its escape, since the work is done by now."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "".join(f"{line}\n" for line in shown)
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
