"""ER-SDE-Solver-3, a third-order solver of a reverse SDE that replaces less of the noise than usual ones.

Source: Cui et al. 2023, Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models. It is for
alpha * (clean + ratio * noise), which latents of flow matching are with alpha = 1 - sigma and ratio = sigma / alpha.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .solver import FlowSolver, noise_like


def noise_scale(ratio: float) -> float:
    """The authors' noise scale function (ER-SDE 5), divided by the ratio."""
    return math.exp(ratio**0.3) + 10


class ErSde(FlowSolver):
    """A first step from noise alone, whose ratio is infinite, replaces all of it: the limit of the formulas."""

    # Of the last step: the clean latents and their slope. Ratios of the last two steps, the latest first.
    _derivatives: tuple[Tensor, ...] = ()
    _ratios: tuple[float, ...] = ()

    def move(self, latents: Tensor, velocity: Tensor, sigma: float, after: float, generator: torch.Generator) -> Tensor:
        """Without noise in the last step, which ends at the clean latents."""
        clean = latents - sigma * velocity
        if after == 0:
            return clean
        ratio, end = sigma / (1 - sigma) if sigma < 1 else math.inf, after / (1 - after)
        kept = noise_scale(end) / noise_scale(ratio)
        moved = after / sigma * kept * latents + (1 - after) * (1 - end / ratio * kept) * clean
        slopes = self._slopes(clean, ratio)
        if slopes:
            for weight, slope in zip(_weights(ratio, end), slopes, strict=False):
                moved = moved + (1 - after) * weight * slope
        return moved + after * math.sqrt(1 - kept**2) * noise_like(latents, generator)

    def _slopes(self, clean: Tensor, ratio: float) -> tuple[Tensor, ...]:
        """First and second derivative of the clean latents over the ratio, as far as the steps before tell them."""
        derivatives = (clean,)
        for order, (before, at) in enumerate(zip(self._derivatives, self._ratios, strict=True), start=1):
            derivatives += ((derivatives[-1] - before) / ((ratio - at) / order),)
        self._derivatives, self._ratios = derivatives[:2], (ratio, *self._ratios)[:2]
        return derivatives[1:]


def _weights(ratio: float, end: float) -> tuple[float, float]:
    """What the first and the second derivative count in a step from one ratio to another.

    The authors take the integrals as sums over 100 places, with errors of up to 5 percent of these weights.
    """
    from scipy.integrate import quad

    places = math.log(end), math.log(ratio)
    first, _ = quad(lambda place: 1 / noise_scale(math.exp(place)), *places)
    second, _ = quad(lambda place: (math.exp(place) - ratio) / noise_scale(math.exp(place)), *places)
    step, scale = end - ratio, end * noise_scale(end)
    return step + scale * first, step**2 / 2 + scale * second
