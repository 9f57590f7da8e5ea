"""How a window of a long video goes on from the one before: LatentHooks that put the motion frames in place.

Source: MeiGen-AI/InfiniteTalk keeps the encoded motion frames at every step; MeiGen-AI/MultiTalk re-noises them to the
level of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo.latents import add_noise, start_noise

if TYPE_CHECKING:
    from ..wanvideo.schedulers import Schedule


@dataclass(frozen=True)
class KeptMotion:
    """InfiniteTalk: the first latent frames are the motion frames [C, f, H, W], before and after every step."""

    motion: Tensor

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Motion frames in place."""
        return torch.cat((self.motion.to(latents), latents[:, self.motion.shape[1] :]), dim=1)

    def after(self, latents: Tensor, index: int) -> Tensor:
        """As before the step."""
        return self.before(latents, index)


@dataclass(frozen=True)
class NoisedMotion:
    """MultiTalk: the first latent frames are the motion frames [C, f, H, W] at the noise level of the step."""

    motion: Tensor
    schedule: Schedule
    generator: torch.Generator

    def _placed(self, latents: Tensor, sigma: Tensor) -> Tensor:
        noise = start_noise(self.motion.shape, self.generator)
        noisy = add_noise(self.motion, noise, sigma)
        return torch.cat((noisy.to(latents), latents[:, self.motion.shape[1] :]), dim=1)

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Only the first step finds latents without motion frames."""
        return self._placed(latents, self.schedule.level(0)) if index == 0 else latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """Motion frames at the level that the step reached."""
        return self._placed(latents, self.schedule.level(index + 1))
