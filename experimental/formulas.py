"""What the guidance options compute from the passes with and without the prompt, [C, F, H, W] float32 each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import with_float64

EPSILON = 1e-8


def optimal_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """The factor, 0-d, that brings uncond nearest to cond. Source: CFG-Zero* (Fan et al. 2025)."""
    return (cond * uncond).sum() / ((uncond**2).sum() + EPSILON)


def tangential(cond: Tensor, uncond: Tensor) -> Tensor:
    """uncond's part along the first right singular vector of the two, by channel. Source: TCFG (arXiv 2503.18137).

    The vector comes from the 2x2 products in float64, so that nothing of the video's size is decomposed.
    """
    pair = torch.stack((cond, uncond), dim=1).flatten(2).to(with_float64(cond.device)).double()
    first = torch.linalg.eigh(pair @ pair.mT).eigenvectors[..., -1:]
    along = (first.mT @ pair).squeeze(1) * first[:, 1]
    return along.view_as(uncond).to(uncond)


def adaptive_scale(cond: Tensor, uncond: Tensor, scale: float, alpha: float) -> float:
    """The guidance scale, lower where the passes differ much. Source: RAAG (arXiv 2508.03442); norms by channel."""
    norms = [video.flatten(1).norm(dim=1) for video in (cond - uncond, uncond)]
    ratio = float((norms[0] / (norms[1] + EPSILON)).mean())
    return 1.0 + (scale - 1.0) * math.exp(-alpha * ratio)


@dataclass(frozen=True)
class FrequencyScales:
    """FreSca (WikiChao/FreSca): low and high spatial frequencies of guidance, scaled apart.

    cutoff: frequencies around the middle of the spectrum that are low. Beyond half a side the published slice begins at
    the other end; results equal the publication's there too.
    """

    low: float = 1.0
    high: float = 1.25
    cutoff: int = 20

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H, W] scaled."""
        row, column = x.shape[-2] // 2, x.shape[-1] // 2
        mask = torch.full(x.shape[-2:], self.high, device=x.device)
        mask[row - self.cutoff : row + self.cutoff, column - self.cutoff : column + self.cutoff] = self.low
        spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1)) * mask
        return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real.to(x.dtype)
