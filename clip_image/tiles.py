"""CLIP features of a picture in tiles: each tile is seen at the encoder's full size, so that small things count.

Source: tiled image encoding of cubiq/ComfyUI_IPAdapter_plus, which the original pack takes up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Encode = Callable[[Tensor], Tensor]


def tiled_features(encode: Encode, images: Tensor, tiles: int, ratio: float, *, crop: bool) -> Tensor:
    """Features [n, 1 + s * s, channels] of images [n, H, W, C]: ratio of the whole picture, the rest of its tiles.

    encode: images -> features, a class token and s x s places. tiles: how many a side; their places are averaged onto
    the whole picture's. crop: the middle square counts, which is what the tiles then cover. Raises ValueError for
    pictures with less than a pixel a tile.
    """
    images = _middle_square(images) if crop else images
    height, width = images.shape[1] // tiles, images.shape[2] // tiles
    if not (height and width):
        raise ValueError(
            f"A picture of {images.shape[2]}x{images.shape[1]} pixels has no {tiles}x{tiles} tiles: choose fewer."
        )
    features = []
    for image, whole in zip(images, encode(images), strict=True):
        rows = image[: height * tiles, : width * tiles].unflatten(0, (tiles, height)).unflatten(2, (tiles, width))
        parts = encode(rows.transpose(1, 2).flatten(0, 1))
        features.append(torch.lerp(_merged(parts, tiles), whole, ratio))
    return torch.stack(features)


def _middle_square(images: Tensor) -> Tensor:
    side = min(images.shape[1:3])
    top, left = (images.shape[1] - side) // 2, (images.shape[2] - side) // 2
    return images[:, top : top + side, left : left + side]


def _merged(parts: Tensor, tiles: int) -> Tensor:
    """Features of tiles [tiles * tiles, 1 + s * s, channels], row by row, as those of one picture [1 + s * s, ...]."""
    side = round((parts.shape[1] - 1) ** 0.5)
    places = parts[:, 1:].unflatten(1, (side, side)).unflatten(0, (tiles, tiles))
    grid = places.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
    return torch.cat((parts[:, :1].mean(dim=0), F.adaptive_avg_pool2d(grid, side).flatten(1).t()))
