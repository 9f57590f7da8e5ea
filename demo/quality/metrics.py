"""How well a mouth follows a voice, and how near two videos are. Videos are [frames, H, W, 3] in 0..1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

MAX_LAG = 2
JOIN_REACH = 8
# Brightness below which a pixel counts as the inside of a mouth, and the width of the soft edge.
DARK, SOFT = 0.26, 0.16


class Sync(NamedTuple):
    """Correlation at its best lag, and that lag in frames; positive where the mouth is late."""

    correlation: float
    lag: int


def mouth_opening(video: Array, box: Sequence[float]) -> Array:
    """Dark share of a mouth's box (left, top, right, bottom in -1..1) in every frame: [frames]."""
    height, width = video.shape[1:3]
    left, right = (int(round((x + 1) / 2 * width)) for x in (box[0], box[2]))
    top, bottom = (int(round((y + 1) / 2 * height)) for y in (box[1], box[3]))
    brightness = video[:, max(top, 0) : bottom, max(left, 0) : right].mean(axis=-1)
    return np.clip((DARK + SOFT / 2 - brightness) / SOFT, 0, 1).mean(axis=(1, 2))


def correlation(a: Array, b: Array) -> float:
    """Pearson's; 0 where one of them does not change."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.std() < 1e-9 or b.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def lagged(mouth: Array, level: Array, lag: int) -> tuple[Array, Array]:
    """The parts that meet when the mouth is `lag` frames late."""
    count = min(len(mouth), len(level))
    mouth, level = mouth[:count], level[:count]
    return (mouth[lag:], level[: count - lag]) if lag >= 0 else (mouth[:lag], level[-lag:])


def lip_sync(mouth: Array, level: Array) -> Sync:
    """Correlation of a mouth with the loudness [frames] at the best lag within two frames."""
    found = [Sync(correlation(*lagged(mouth, level, lag)), lag) for lag in range(-MAX_LAG, MAX_LAG + 1)]
    return max(found)


def cross_talk(mouth: Array, own: Array, other: Array) -> float:
    """Correlation of a mouth with the other's voice at the lag of its own, less what the two voices share."""
    lag = lip_sync(mouth, own).lag
    count = min(len(own), len(other))
    return correlation(*lagged(mouth, other, lag)) - correlation(own[:count], other[:count])


def near_joins(frames: int, joins: Sequence[int]) -> NDArray[np.bool_]:
    """Which frames lie within 8 of a window's first new frame."""
    index = np.arange(frames)
    return np.any([np.abs(index - join) <= JOIN_REACH for join in joins], axis=0) if len(joins) else index < 0


def psnr(a: Array, b: Array) -> float:
    """Peak signal to noise ratio in dB of values in 0..1; equal ones count as 99."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return 99.0 if error < 1e-10 else -10 * float(np.log10(error))


def ssim(a: Array, b: Array) -> float:
    """Mean structural similarity of the frames."""
    from skimage.metrics import structural_similarity

    return float(
        np.mean([structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in zip(a, b, strict=True)])
    )
