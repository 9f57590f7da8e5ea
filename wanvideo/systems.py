"""The conditioning systems that a model may have, and those that are known but not built. `registry.py` lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .checkpoint import Checkpoint
from .extension import Extension
from .families import Kind, Shapes, kind_of


class Unbuilt(NamedTuple):
    """A pattern of keys, one of which gives a system away, and the system's name."""

    pattern: str
    system: str


@dataclass(frozen=True, kw_only=True)
class Systems:
    """extensions: in the order in which their hooks run. keys: how files of unbuilt systems are told."""

    extensions: tuple[type[Extension], ...]
    keys: tuple[Unbuilt, ...] = ()

    def detect(self, shapes: Shapes) -> tuple[Extension, ...]:
        """The systems whose weights are among these tensors, in order.

        shapes: published name -> shape. Raises ValueError, naming both, if two systems claim one key.
        """
        present = tuple(e for e in (kind.detect(shapes) for kind in self.extensions) if e is not None)
        for key in shapes:
            owners = [type(e).__name__ for e in present if e.owns(key)]
            if len(owners) > 1:
                raise ValueError(f"Both {' and '.join(owners)} claim the key '{key}'; the checkpoint is ambiguous.")
        return present

    def kind_of(self, shapes: Shapes) -> Kind | None:
        """What a file with these tensors is, or None where nothing fits."""
        built = [kind.file for kind in self.extensions if kind.file is not None]
        others = [file for kind in self.extensions for file in kind.other_files]
        return kind_of(shapes, (*built, *others))

    def beside(self, checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint] | None:
        """What `Extension.beside` gives of the system whose model such a file holds."""
        kind = self.kind_of(checkpoint.shapes)
        if kind is None:
            return None
        return next((system.beside(checkpoint) for system in self.extensions if system.file == kind), None)

    def missing(self, shapes: Shapes) -> dict[str, str]:
        """Systems that these tensors belong to and that are not built: name -> the first key that shows it."""
        present = self.detect(shapes)
        missing: dict[str, str] = {}
        for row in self.keys:
            key = next((k for k in shapes if re.search(row.pattern, k)), None)
            if key is not None and not any(extension.owns(key) for extension in present):
                missing.setdefault(row.system, key)
        return missing
