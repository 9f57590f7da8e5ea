"""Tracks drawn on frames: a disc where each is, and the way that it has come, fading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

Colour = tuple[int, int, int]
COLOURS: tuple[Colour, ...] = ((102, 153, 255), (0, 255, 255), (255, 255, 0), (255, 102, 204), (0, 255, 0))


def draw_tracks(
    frames: Tensor, tracks: Tensor, visible: Tensor, *, trail: int, radius: int, opacity: float, line_width: int
) -> Tensor:
    """IMAGE frames [F, H, W, 3] with tracks [F, N, 2] (x, y in pixels) where they are visible [F, N].

    trail: frames that a way goes back. radius, line_width: in pixels, the line's at the disc; opacity: 0..1.
    """
    points, seen = tracks.cpu().long().numpy(), visible.cpu().numpy()
    drawn = []
    for now, frame in enumerate((frames.cpu() * 255).byte().numpy()):
        shown = [(n, COLOURS[n % len(COLOURS)]) for n in range(points.shape[1]) if seen[now, n]]
        discs, ways = (Image.new("RGBA", (frame.shape[1], frame.shape[0])) for _ in range(2))
        for n, colour in shown:
            x, y = points[now, n].tolist()
            box = (x - radius, y - radius, x + radius, y + radius)
            ImageDraw.Draw(discs).ellipse(box, fill=(*colour, int(255 * opacity)))
            way = points[max(now - trail, 0) : now + 1, n][::-1].astype(float)
            _draw_way(ways, way, colour, opacity=opacity, width=line_width)
        drawn.append(_over(ways, _over(discs, frame.astype(np.float32))))
    return torch.from_numpy(np.stack(drawn).astype(np.uint8)).float() / 255


def _over(layer: Image.Image, frame: np.ndarray) -> np.ndarray:
    pixels = np.asarray(layer, dtype=np.float32)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + frame * (1 - alpha)


def _draw_way(layer: Image.Image, way: np.ndarray, colour: Sequence[int], *, opacity: float, width: int) -> None:
    """A line through the points of `way` [n, 2], which ends thin and clear."""
    lengths = np.linalg.norm(np.diff(way, axis=0), axis=1)
    behind = np.concatenate(([0.0], np.cumsum(lengths)))
    pen = ImageDraw.Draw(layer)
    for start, end, length, before in zip(way[:-1], way[1:], lengths, behind[:-1], strict=True):
        steps = max(int(length), 1)
        for share in np.arange(steps) / steps:
            left = 1 - (before + share * length) / behind[-1] if behind[-1] else 0.0
            x, y = (start + (end - start) * share).astype(int).tolist()
            fill = (*colour, int(255 * left * opacity))
            pen.line(((x, y), (x + 1, y)), fill=fill, width=max(int(width * left), 1))
