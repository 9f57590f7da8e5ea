"""Tracks that a user draws: points of a picture that move with time, as JSON.

Source: bytedance/ATI (wan/utils/motion.py): tracks have 121 points, for 24 frames a second, of which the model's 81
frames, at 16 a second, take two of three.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

POINTS = 121
# Latent frames of the video that the tracks span, and video frames of each but the first.
LATENTS = 21
FRAMES_A_LATENT = 4
EPSILON = 1e-5

FORM = 'like [[{"x": 10, "y": 20}, ...], ...]: for every track its points, in pixels'


def parse_tracks(text: str | Sequence[str]) -> list[Tensor]:
    """Tracks [points, 2] (x, y) in pixels, of JSON: one or several tracks, or a list of texts of one track each.

    Raises ValueError for what is not tracks.
    """
    try:
        parsed = [json.loads(part.replace("'", '"')) for part in ([text] if isinstance(text, str) else text)]
        tracks = parsed[0] if isinstance(text, str) else parsed
        if tracks and isinstance(tracks[0], dict):
            tracks = [tracks]
        points = [torch.tensor([(p["x"], p["y"]) for p in track], dtype=torch.float32) for track in tracks]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"The tracks are not JSON {FORM} ({type(error).__name__}: {error}).") from error
    if not points or any(track.ndim != 2 or not len(track) for track in points):
        raise ValueError(f"There is no track: tracks are JSON {FORM}.")
    return points


def padded(tracks: Sequence[Tensor]) -> Tensor:
    """Tracks as [N, 121, 3] (x, y, visible): longer ones are cut, shorter ones are invisible where they have ended."""
    whole = torch.zeros(len(tracks), POINTS, 3)
    for row, track in zip(whole, tracks, strict=True):
        count = min(len(track), POINTS)
        row[:count, :2], row[:count, 2] = track[:count], 1.0
    return whole


def latent_tracks(tracks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tracks [N, 121, 3] of a picture of this size (width, height): where they start, and where they are.

    Returns the starts [N, 2] and the points of every latent frame [21, N, 3] (x, y, visible): positions from the middle
    in halves of the short side, the mean over the frames in which a track is seen; visible 0 or 1. Those of the first
    latent frame are not used.
    """
    positions = (tracks[..., :2] - torch.tensor(size) / 2) / min(size) * 2
    groups = (LATENTS - 1, FRAMES_A_LATENT)
    frames = 1 + (3 * torch.arange(groups[0] * groups[1]) + 1) // 2
    seen = tracks[:, frames, 2:].transpose(0, 1).unflatten(0, groups)
    where = positions[:, frames].transpose(0, 1).unflatten(0, groups)
    count = seen.sum(1)
    points = torch.cat(((where * seen).sum(1) / (count + EPSILON), count.clamp(max=1)), dim=-1)
    return positions[:, 0], torch.cat((torch.zeros_like(points[:1]), points))
