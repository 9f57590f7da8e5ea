"""Borders around pictures: of one color, or of the picture's own edge (KJNodes)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def with_borders(image: Tensor, borders: Sequence[int], mode: str, color: str) -> Tensor:
    """Images [n, H, W, C] with borders (left, right, top, bottom).

    mode: color, edge (the mean of the line beside the border) or edge_pixel (each pixel of it, drawn outwards). Raises
    ValueError for a color that the images cannot have.
    """
    height, width, channels = image.shape[1:]
    planes = functional.pad(image.movedim(-1, 1), tuple(borders), mode="replicate").movedim(1, -1).clone()
    if mode == "color":
        values = to_color(color)[:channels]
        if len(values) not in (1, channels):
            raise ValueError(f"'{color}' is no pad_color; write {channels} numbers from 0 to 255, such as '0, 0, 0'.")
        outside = functional.pad(torch.zeros(height, width, dtype=torch.bool), tuple(borders), value=True)
        planes[:, outside] = values.to(image)
    elif mode == "edge":
        _fill_with_means(planes, image, borders)
    return planes


def to_color(text: str) -> Tensor:
    """Numbers from 0 to 255 between commas, as 0 to 1. Raises ValueError for anything else."""
    try:
        values = torch.tensor([float(part) for part in text.split(",")]) / 255
    except ValueError:
        values = torch.tensor([torch.nan])
    if not torch.isfinite(values).all():
        raise ValueError(f"'{text}' is no pad_color; write numbers from 0 to 255 between commas, such as '0, 0, 0'.")
    return values


def _fill_with_means(planes: Tensor, image: Tensor, borders: Sequence[int]) -> None:
    """Each border of [n, H, W, C] in the mean color of the picture's line beside it; the corners are the sides'."""
    left, right, top, bottom = borders
    height, width = image.shape[1:3]
    planes[:, :top] = image[:, :1].mean(dim=2, keepdim=True)
    planes[:, top + height :] = image[:, -1:].mean(dim=2, keepdim=True)
    planes[:, :, :left] = image[:, :, :1].mean(dim=1, keepdim=True)
    planes[:, :, left + width :] = image[:, :, -1:].mean(dim=1, keepdim=True)
