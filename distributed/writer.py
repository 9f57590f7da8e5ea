"""Footage of a video that several processes make: one writes, the others follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..wanvideo.footage import Footage, Reached


class Telling(Protocol):
    """Processes of which the first tells the others."""

    def told(self, value: object) -> object:
        """What the first process says, on every process."""


class SharedWriter:
    """The footage itself on the first process; elsewhere None, of which nothing is written and little is held."""

    def __init__(self, footage: Footage | None, ranks: Telling) -> None:
        self._footage = footage
        self._ranks = ranks
        self._frames = 0

    @property
    def frames(self) -> int:
        """Frames so far."""
        return self._frames if self._footage is None else self._footage.frames

    def open(self) -> Reached:
        """Where all go on: where the first one's folder says."""
        if self._footage is not None:
            reached = self._footage.open()
            return self._ranks.told((reached, self._footage.frames))[0]
        reached, self._frames = self._ranks.told(None)
        return reached

    def close(self) -> None:
        """Let go of the folder."""
        if self._footage is not None:
            self._footage.close()

    def add(self, images: Tensor) -> None:
        """Take frames [n, H, W, 3] in 0..1."""
        self._frames += len(images)
        if self._footage is not None:
            self._footage.add(images)

    def finish_window(self, windows: int, handover: Mapping[str, Tensor]) -> None:
        """A window counts from here on."""
        if self._footage is not None:
            self._footage.finish_window(windows, handover)

    def finish(self) -> None:
        """Tidy up."""
        if self._footage is not None:
            self._footage.finish()

    def video(self) -> Tensor:
        """All frames [n, H, W, 3] in -1..1; elsewhere one black one [1, 64, 64, 3], which nothing reads."""
        return torch.full((1, 64, 64, 3), -1.0) if self._footage is None else self._footage.video()

    def rescue(self, folder: Path) -> Path:
        """Write the frames so far; returns where."""
        return folder if self._footage is None else self._footage.rescue(folder)
