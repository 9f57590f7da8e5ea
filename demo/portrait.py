"""Portraits that the demo's models know: drawn faces, front view, mouth shut. Draws one, and tells whether one is such.

The test is that of eigenfaces (Turk and Pentland 1991): a picture belongs to the drawn faces if few principal
components of them make up nearly all of it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .faces import SIZE, Dice, draw_characters, draw_motions, render

EXAMPLES, COMPONENTS, GRID, BATCH = 800, 80, 24, 50
FARTHEST = 0.37
LEAST_CONTRAST = 0.03
NARROWEST = 0.75


def draw(seed: int, count: int = 1, size: int = SIZE) -> Tensor:
    """Random people who look ahead with shut mouths: [count, 3, size, size] in 0..1."""
    dice = Dice(seed)
    pictures = []
    for start in range(0, count, BATCH):
        number = min(BATCH, count - start)
        characters = draw_characters(dice, number)
        poses, _ = draw_motions(dice, torch.zeros(number, 1, 1))
        poses.shift.zero_()
        poses.tilt.zero_()
        poses.eyes.fill_(1)
        pictures.append(render(characters, poses, size)[:, 0])
    return torch.cat(pictures)


def save(path: Path, seed: int, size: int) -> None:
    """Draw one and write it as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (draw(seed, size=size)[0].movedim(0, -1) * 255).round().byte()
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def check(path: Path) -> None:
    """Raises ValueError, with what to do, if the picture is not one that the demo's models can make talk."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file.") from error
    if min(picture.size) < SIZE or min(picture.size) < NARROWEST * max(picture.size):
        raise ValueError(
            f"{path} has {picture.width}x{picture.height} pixels: the demo needs about square pictures of at least "
            f"{SIZE}x{SIZE}; crop or enlarge it."
        )
    side = min(picture.size)
    square = ImageOps.fit(picture, (side, side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).movedim(-1, 0)
    strangeness = float(distance(pixels[None]))
    if not strangeness < FARTHEST:
        raise ValueError(
            f"{path} is no picture that the demo's tiny models know (distance {strangeness:.2f}, at most {FARTHEST}):"
            " they make one drawn face talk that looks ahead, fills most of the height and stands in the middle of a"
            " plain background (demo/MODEL_CARD.md). Real photos need the real models."
        )


def distance(pictures: Tensor) -> Tensor:
    """[B, 3, 128, 128] in 0..1 -> the share [B] of each picture that drawn faces do not explain; 1 for flat ones."""
    components, features = _components(), _features(pictures)
    return torch.where(features.norm(dim=1) > 0, (features - features @ components.T @ components).norm(dim=1), 1.0)


@cache
def _components() -> Tensor:
    """The principal components of drawn faces: drawing these takes seconds."""
    return torch.linalg.svd(_features(draw(0, EXAMPLES)), full_matrices=False).Vh[:COMPONENTS]


def _features(pictures: Tensor) -> Tensor:
    """Small pictures less their mean colour, of length 1; zero where there is next to no contrast."""
    cells = F.adaptive_avg_pool2d(pictures, GRID)
    cells = (cells - cells.mean(dim=(2, 3), keepdim=True)).flatten(1)
    contrast = cells.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(contrast > LEAST_CONTRAST, F.normalize(cells, dim=1), 0.0)
