"""Changes of the guided velocity: none in the first steps, and sampling at another temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import with_float64
from ..wanvideo.conditioning import Step
from ..wanvideo.modifier import Modifier, Velocity


@dataclass(frozen=True)
class ZeroInit(Modifier):
    """CFG-Zero* (Fan et al. 2025): steps 0 to `last` of the run leave the noise as it is, without the model."""

    last: int = 0

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """0 in those steps."""

        def zero_first(latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
            return torch.zeros_like(latents) if step.in_run <= self.last else velocity(latents, timestep, step)

        return zero_first


@dataclass(frozen=True)
class TemporalScoreRescaling(Modifier):
    """TSR (temporalscorerescaling/TSR). k: sampling temperature; sigma: how early it acts."""

    k: float = 0.95
    sigma: float = 1.0

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The rescaled velocity; pure noise (timestep 1000) is left alone."""

        def rescaled(latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
            v = velocity(latents, timestep, step)
            t = timestep.to(with_float64(timestep.device)).double() / 1000
            ratio, share = (c.reshape(-1, 1, 1).to(v) for c in self._factors(t))
            return ratio * v + share * latents.to(v)

        return rescaled

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of velocity and latents. In float64, because near t = 1 the second is a quotient of two small numbers."""
        snr = ((1 - t) / t) ** 2 * self.sigma**2
        ratio = torch.where(t == 0, self.k, (snr + 1) / (snr / self.k + 1))
        ratio = torch.where(t == 1, 1.0, ratio)
        return ratio, torch.where(t == 1, 0.0, (ratio - 1) / (1 - t))
