"""What a LoRA node asks for."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """One LoRA of a WanVideoLoraSelect (socket WANVIDLORA, a tuple of these).

    strength: one number, or one a step (then it cannot be merged). blocks: names such as "blocks.3." that are used,
    None for all; layers outside blocks always are. skip_layers: parts of names of layers that are not. merge: into the
    weights at load, else beside them. claimed: shell patterns of the layers that another system takes from the file
    (`reading.open_lora` gives it the tensors), such as "patch_embedding" or, for Stand-In's pairs, "*_loras"; they are
    neither used here nor left out. widens: it works only in steps whose payloads fill the channels that it adds
    (widening.py).
    """

    path: Path
    strength: float | tuple[float, ...] = 1.0
    blocks: tuple[str, ...] | None = None
    skip_layers: tuple[str, ...] = ()
    merge: bool = True
    claimed: tuple[str, ...] = ()
    widens: bool = False

    def at(self, step: int) -> float:
        """Strength at a step; a list that is too short goes on with its last value."""
        if isinstance(self.strength, float | int):
            return float(self.strength)
        return float(self.strength[min(step, len(self.strength) - 1)])

    def selects(self, layer: str) -> bool:
        """Whether the nodes ask for this layer's change."""
        if any(part and part in layer for part in self.skip_layers):
            return False
        return self.blocks is None or not layer.startswith("blocks.") or layer.startswith(self.blocks)

    def claims(self, *names: str) -> bool:
        """Whether another system takes what has one of these names: the model's or the file's of a layer, or a key."""
        return any(fnmatchcase(name, pattern) for pattern in self.claimed for name in names)
