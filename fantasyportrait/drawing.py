"""Dots on pictures, as OpenCV fills circles, so that previews look as they did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def disc(radius: int) -> list[tuple[int, int]]:
    """(x, y) of the pixels of a filled circle around (0, 0), by Bresenham's midpoint rule."""
    half_widths: dict[int, int] = {}
    long, short, error = radius, 0, 0
    while long >= short:
        for row, width in ((short, long), (long, short)):
            half_widths[row] = max(half_widths.get(row, 0), width)
        error += 2 * short + 1
        short += 1
        if error > 0:
            error -= 2 * long - 1
            long -= 1
    rows = {row: half_widths[abs(row)] for row in range(-radius, radius + 1)}
    return [(x, y) for y, width in rows.items() for x in range(-width, width + 1)]


def dotted(image: Tensor, points: Iterable[Sequence[float]], radius: int, color: Sequence[float]) -> Tensor:
    """A copy of the image [H, W, 3] with a dot at each point (x, y); what lies outside is left out."""
    image, (height, width, _) = image.clone(), image.shape
    shape = torch.tensor(disc(radius))
    for point in points:
        x, y = (shape + torch.tensor([int(point[0]), int(point[1])])).unbind(1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        image[y[inside], x[inside]] = torch.tensor(color, dtype=image.dtype)
    return image
