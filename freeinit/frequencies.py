"""Low-pass filters over a video's frequencies, and the mixture of two videos by them.

Source: FreeInit (Wu et al. 2023; TianxingWu/FreeInit). Frequencies are shifted: the middle of each axis is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AXES = (-3, -2, -1)


def gaussian(distance: Tensor, cutoff: float, order: int) -> Tensor:
    """exp(-d^2 / (2 cutoff^2)) of squared distances."""
    return torch.exp(-distance / (2 * cutoff**2))


def butterworth(distance: Tensor, cutoff: float, order: int) -> Tensor:
    """1 / (1 + (d^2 / cutoff^2)^order): the higher the order, the steeper."""
    return 1 / (1 + (distance / cutoff**2) ** order)


def ideal(distance: Tensor, cutoff: float, order: int) -> Tensor:
    """1 where d^2 is at most twice the cutoff, as published; 0 elsewhere."""
    return (distance <= cutoff * 2).to(distance.dtype)


FILTERS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "butterworth": butterworth,
    "ideal": ideal,
    "gaussian": gaussian,
}


def low_pass(sizes: Sequence[int], name: str, *, order: int, spatial: float, temporal: float) -> Tensor:
    """Mask [F, H, W] float32 for latents of these sizes; a cutoff of 0 lets nothing through.

    spatial, temporal: where each axis is cut off, as a share of its highest frequency. order: of butterworth.
    """
    if spatial == 0 or temporal == 0:
        return torch.zeros(*sizes)
    time, height, width = (2 * torch.arange(size, dtype=torch.float64) / size - 1 for size in sizes)
    distance = ((spatial / temporal * time) ** 2)[:, None, None] + (height**2)[:, None] + width**2
    return FILTERS[name](distance, spatial, order).float()


def mixed(low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
    """The frequencies of `low` [C, F, H, W] where `mask` [F, H, W] is 1, of `high` where it is 0."""
    below, above = (torch.fft.fftshift(torch.fft.fftn(video, dim=AXES), dim=AXES) for video in (low, high))
    spectrum = below * mask + above * (1 - mask)
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=AXES), dim=AXES).real
