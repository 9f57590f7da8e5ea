"""Footage of a video that several processes make: one writes, the others follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..wanvideo.footage import Footage, MemoryFootage, Reached


class Telling(Protocol):
    """Processes of which the first tells the others."""

    def told(self, value: object) -> object:
        """What the first process says, on every process."""


class SharedWriter:
    """The footage itself on the first process; elsewhere None, of which nothing is written and little is held.

    copy: takes the frames elsewhere, where something reads the video.
    """

    def __init__(self, footage: Footage | None, ranks: Telling, copy: MemoryFootage | None = None) -> None:
        self._footage = footage
        self._copy = copy
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
        for footage in (self._footage, self._copy):
            if footage is not None:
                footage.add(images)

    def finish_window(self, windows: int, handover: Mapping[str, Tensor]) -> None:
        """A window counts from here on."""
        if self._footage is not None:
            self._footage.finish_window(windows, handover)

    def finish(self) -> None:
        """Tidy up."""
        if self._footage is not None:
            self._footage.finish()

    def video(self) -> Tensor:
        """All frames [n, H, W, 3] in -1..1; elsewhere those of the copy, or a black one [1, 64, 64, 3] to be unread."""
        footage = self._footage or self._copy
        return torch.full((1, 64, 64, 3), -1.0) if footage is None else footage.video()

    def rescue(self, folder: Path) -> Path:
        """Write the frames so far; returns where."""
        return folder if self._footage is None else self._footage.rescue(folder)
