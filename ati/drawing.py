"""Tracks drawn on frames: discs that grow, and turn from blue to red, the newer a point is."""

from __future__ import annotations

import torch
from torch import Tensor


def age_colour(ratio: float) -> tuple[float, float, float]:
    """Red, green, blue (0..1): blue at 0, green at 1/3, yellow at 2/3, red at 1."""
    if ratio <= 1 / 3:
        return 0.0, 3 * ratio, 1 - 3 * ratio
    if ratio <= 2 / 3:
        return 3 * ratio - 1, 1.0, 0.0
    return 1.0, 3 - 3 * ratio, 0.0


def draw_tracks(frames: Tensor, tracks: Tensor, *, smallest: int, largest: int, retain: int) -> Tensor:
    """IMAGE frames [F, H, W, 3] with the last points of every track.

    tracks [N, F, 3]: x, y in pixels and whether the point is seen. smallest, largest: radius of a point that is
    `retain` frames old, and of the newest.
    """
    drawn = frames.clone()
    height, width = frames.shape[1:3]
    limit = torch.tensor((width - 1, height - 1))
    places = (tracks[..., :2] + 0.5).minimum(limit).clamp(min=0).long().tolist()
    for now, frame in enumerate(drawn):
        for track, seen in zip(places, tracks[..., 2].tolist(), strict=True):
            for then in range(max(now - retain, 0), now + 1):
                if seen[then]:
                    ratio = 1 - (now - then) / max(retain, 1)
                    _disc(frame, track[then], round(smallest + (largest - smallest) * ratio), age_colour(ratio))
    return drawn


def _disc(frame: Tensor, place: list[int], radius: int, colour: tuple[float, float, float]) -> None:
    """Fills the disc in the frame [H, W, 3]; what lies outside is left out."""
    x, y = place
    left, top = max(x - radius, 0), max(y - radius, 0)
    part = frame[top : y + radius + 1, left : x + radius + 1]
    rows, columns = torch.arange(top - y, top - y + part.shape[0]), torch.arange(left - x, left - x + part.shape[1])
    part[rows[:, None] ** 2 + columns**2 <= radius**2] = frame.new_tensor(colour)
