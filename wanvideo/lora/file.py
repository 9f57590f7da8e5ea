"""What a LoRA node asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self


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

    @classmethod
    def chosen(
        cls,
        path: Path,
        strength: float | Iterable[float],
        blocks: Iterable[str] | None,
        layer_filter: str | Iterable[str],
        merge: bool,
    ) -> Self:
        """From what nodes give: layer_filter, texts that commas may separate."""
        texts = [layer_filter] if isinstance(layer_filter, str) else layer_filter
        parts = (part.strip() for text in texts for part in text.split(","))
        return cls(
            path=path,
            strength=strength if isinstance(strength, int | float) else tuple(strength),
            blocks=None if blocks is None else tuple(blocks),
            skip_layers=tuple(filter(None, parts)),
            merge=merge,
        )

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


def lora_files(value: Iterable[LoraFile | Mapping[str, object]] | None) -> tuple[LoraFile, ...]:
    """The LoRAs that arrive at a WANVIDLORA socket, those of strength 0 left out.

    Nodes that other packs made for the original pack (ComfyUI-Lora-Manager's, say) give its dicts. Raises ValueError
    for anything else.
    """
    files = (entry if isinstance(entry, LoraFile) else _from_dict(entry) for entry in value or ())
    return tuple(file for file in files if file.strength != 0)


def _from_dict(entry: object) -> LoraFile:
    if not isinstance(entry, Mapping) or not {"path", "strength"} <= entry.keys():
        raise ValueError(
            f"A node of another pack gives LoRAs as {type(entry).__name__} without a path and a strength, which cannot "
            "be used here: choose them with WanVideo Lora Select."
        )
    return LoraFile.chosen(
        Path(entry["path"]),
        entry["strength"],
        # There an empty choice is none.
        entry.get("blocks") or None,
        entry.get("layer_filter") or "",
        bool(entry.get("merge_loras", True)),
    )
