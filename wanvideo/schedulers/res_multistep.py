"""RES, a second-order exponential multistep solver.

Source: Zhang et al. 2024, Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling.
The prediction of the clean latents is a straight line through the last two, over the logarithm of the noise level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .solver import FlowSolver


class ResMultistep(FlowSolver):
    """Deterministic, without the paper's stochastic form."""

    _before: tuple[float, Tensor] | None = None

    def move(self, latents: Tensor, velocity: Tensor, sigma: float, after: float, generator: torch.Generator) -> Tensor:
        """Euler's step, which is the exponential one of first order, and what the line's slope adds to it."""
        clean = latents - sigma * velocity
        moved = latents + (after - sigma) * velocity
        if self._before is not None and after > 0:
            sigma_before, clean_before = self._before
            h = math.log(sigma / after)
            phi2 = (1 + math.expm1(-h) / h) / h
            moved = moved + h * h * phi2 / math.log(sigma_before / sigma) * (clean - clean_before)
        self._before = sigma, clean
        return moved
