"""3-D rotary position embedding of Wan in real arithmetic (Su et al. 2021; Wan-Video/Wan2.1)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .config import ROPE_THETA

RIFLEX_MARGIN = 0.9
UNSCALED = (1.0, 1.0, 1.0)


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with time, height and width; they add up to `head_dim`."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _axis_angles(
    start: int, length: int, size: int, *, base_scale: float, riflex_index: int = 0, riflex_frames: int = 1
) -> Tensor:
    frequencies = (ROPE_THETA * base_scale) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if riflex_index:
        # RIFLEx (Zhao et al. 2025): the component that would repeat within the clip is slowed to less than one period.
        frequencies[riflex_index - 1] = RIFLEX_MARGIN * 2 * math.pi / riflex_frames
    return torch.outer(torch.arange(start, start + length, dtype=torch.float64), frequencies)


# A forward asks for the video's table, and for those of references beside it: with fewer places than that each of them
# would be made anew in every forward.
@functools.lru_cache(maxsize=4)
def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    start: tuple[int, int, int] = (0, 0, 0),
    base_scales: tuple[float, float, float] = UNSCALED,
    riflex_index: int = 0,
    riflex_frames: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Cosine and sine of every token's rotation: [frames * height * width, head_dim / 2, 2] float32.

    start: position of the first token. base_scales: factors on the base 10000 of time, height and width; more than 1
    turns slower (NTK-aware scaling). riflex_index: which temporal component RIFLEx slows, counted from 1; 0 is off.
    riflex_frames: frames of the video that it slows it for, where the grid is not that video. Raises ValueError if the
    index is out of range.
    """
    time_size, height_size, width_size = axis_sizes(head_dim)
    if not 0 <= riflex_index <= time_size // 2:
        raise ValueError(f"riflex_freq_index must be 0 to {time_size // 2} for this model, not {riflex_index}.")
    frames, height, width = grid
    in_time, in_height, in_width = base_scales
    length = riflex_frames or frames
    time = _axis_angles(
        start[0], frames, time_size, base_scale=in_time, riflex_index=riflex_index, riflex_frames=length
    )
    rows = _axis_angles(start[1], height, height_size, base_scale=in_height)
    columns = _axis_angles(start[2], width, width_size, base_scale=in_width)
    parts = (
        time[:, None, None].expand(frames, height, width, -1),
        rows[None, :, None].expand(frames, height, width, -1),
        columns[None, None, :].expand(frames, height, width, -1),
    )
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)
