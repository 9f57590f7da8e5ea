"""A multistep ODE solver that is meant to settle: Adams-Bashforth steps whose order falls with the noise.

Source: eddyhhlure1Eddy/ode-ComfyUI-WanVideoWrapper (scheduler sa_ode_stable), without its shortened last steps, which
leave some of the noise in the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .solver import FlowSolver

# Of the latest velocity and those before it, by the order. They are those of equal steps.
ADAMS_BASHFORTH = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}
# Schedules of so few steps take the second order throughout, and nothing settles.
FEW_STEPS = 8
# Noise levels: the third order below the first, the second order and smoothing below the next, means below the last.
NOISY, SETTLING, SETTLED = 0.7, 0.15, 0.05
# Share of the smoothed velocity that a step keeps.
SMOOTHING = 0.8


class StableOde(FlowSolver):
    """Deterministic."""

    # The latest first.
    _velocities: tuple[Tensor, ...] = ()
    _smoothed: Tensor | None = None

    def move(self, latents: Tensor, velocity: Tensor, sigma: float, after: float, generator: torch.Generator) -> Tensor:
        """Along the extrapolated velocity, near the end along a mean of several."""
        self._velocities = (velocity, *self._velocities)[:3]
        direction = self._extrapolated(sigma)
        if self.total > FEW_STEPS:
            direction = self._settled(direction, sigma)
        return latents + (after - sigma) * direction

    def _extrapolated(self, sigma: float) -> Tensor:
        third = self.total > FEW_STEPS and SETTLING < sigma <= NOISY
        weights = ADAMS_BASHFORTH[min(3 if third else 2, len(self._velocities))]
        return sum(weight * velocity for weight, velocity in zip(weights, self._velocities, strict=False))

    def _settled(self, direction: Tensor, sigma: float) -> Tensor:
        """Smoothed over the steps below one noise level, and below another mixed with the mean of the last three."""
        if sigma < SETTLING and self._smoothed is not None:
            direction = SMOOTHING * self._smoothed + (1 - SMOOTHING) * direction
        self._smoothed = direction
        if sigma < SETTLED and len(self._velocities) == 3:
            share = sigma / SETTLED
            direction = share * direction + (1 - share) * sum(self._velocities) / 3
        return direction
