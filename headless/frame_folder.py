"""Frames that a long run wrote to a folder, in the place of the black frame that its nodes hand on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .picture_file import open_picture

STAND_IN = (1, 64, 64, 3)


class FrameFolder:
    """The pictures frame_00000.png, ... of a folder as IMAGE frames [H, W, 3] in 0..1, read one by one.

    Raises ValueError if there are none, or one between them is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        numbers = sorted(int(p.stem[6:]) for p in folder.glob("frame_*.png") if p.stem[6:].isdecimal())
        if not numbers:
            raise ValueError(f"There are no frames (frame_00000.png, ...) in {folder}; give the folder that has them.")
        missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        if missing:
            raise ValueError(f"frame_{missing[0]:05d}.png is missing in {folder}; number the frames from 0 on.")
        self._count = len(numbers)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        with open_picture(self.folder / f"frame_{index:05d}.png") as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).float().div_(255)


def folder_of(value: object) -> Path | None:
    """The folder that a LATENT says its frames are in."""
    path = value.get("output_path") if isinstance(value, Mapping) else None
    return Path(path) if isinstance(path, str) and path else None


def is_stand_in(value: object) -> bool:
    """Whether this is the one black frame that takes the place of frames in a folder."""
    return isinstance(value, Tensor) and tuple(value.shape) == STAND_IN and not value.any()
