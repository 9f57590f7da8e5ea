"""LoRA files that bring weights of a conditioning system's own, alone or beside changes of the model's layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from .checkpoint import Checkpoint, open_checkpoint
from .extension import Extension
from .lora import LoraFile
from .lora.names import bare
from .systems import Systems

log = logging.getLogger("wanvideo")


class LoraWeights(NamedTuple):
    """What systems take from LoRA files.

    loras: the files that change layers as well, what is taken claimed. checkpoints: the weights under published names.
    strengths: of each such system.
    """

    loras: tuple[LoraFile, ...]
    checkpoints: tuple[Checkpoint, ...]
    strengths: dict[type[Extension], float]

    def strengthened(self, extensions: Sequence[Extension]) -> tuple[Extension, ...]:
        """The extensions, those with weights from a LoRA file at its strength."""
        return tuple(e.at_strength(self.strengths[type(e)]) if type(e) in self.strengths else e for e in extensions)


def take(files: Sequence[LoraFile], systems: Systems) -> LoraWeights:
    """Find, by their headers, the weights that belong to systems.

    Raises ValueError for a file of weights whose strength changes with the step, or of which blocks are chosen.
    """
    loras: list[LoraFile] = []
    checkpoints: list[Checkpoint] = []
    strengths: dict[type[Extension], float] = {}
    for file in files:
        owners = owners_of(file, systems)
        if not owners:
            loras.append(file)
            continue
        name = file.path.name
        if not isinstance(file.strength, int | float):
            raise ValueError(f"{name} holds layers of its own, which have one strength for all steps: give one number.")
        if file.blocks is not None or file.skip_layers:
            raise ValueError(f"{name} holds layers of its own, which work in all blocks alone: choose none of them.")
        patterns = tuple(pattern for owner in owners for pattern in owner.lora_layers)
        opened = open_checkpoint(file.path).renamed(bare)
        taken = opened.chosen(lambda key, patterns=patterns: _matches(key, patterns))
        checkpoints.append(taken)
        strengths |= dict.fromkeys(owners, float(file.strength))
        log.info("LoRA %s: %d tensors are layers of their own.", name, len(taken.shapes))
        if len(taken.shapes) < len(opened.shapes):
            loras.append(replace(file, claimed=(*file.claimed, *patterns)))
    return LoraWeights(tuple(loras), tuple(checkpoints), strengths)


def refuse(files: Sequence[LoraFile], systems: Systems) -> None:
    """Raise ValueError for a file that brings weights of a system, where layers cannot be added any more."""
    for file in files:
        if owners_of(file, systems):
            raise ValueError(
                f"The LoRA {file.path.name} brings layers of its own, which a model gets when it is loaded: connect it "
                "to the 'lora' input of WanVideoModelLoader."
            )


def owners_of(file: LoraFile, systems: Systems) -> tuple[type[Extension], ...]:
    """The systems that have weights in the file."""
    candidates = [extension for extension in systems.extensions if extension.lora_layers]
    if not candidates:
        return ()
    keys = [bare(key) for key in open_checkpoint(file.path).shapes]
    return tuple(e for e in candidates if any(_matches(key, e.lora_layers) for key in keys))


def _matches(key: str, layers: Sequence[str]) -> bool:
    return any(fnmatchcase(key, f"{layer}.*") for layer in layers)
