"""Extension of a video: frames that are known stand at a time of their own while the others are denoised.

Source: SkyworkAI/SkyReels-V2 (diffusion_forcing_pipeline.py), frames in step with each other (ar_step 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..wanvideo.conditioning import Step
from ..wanvideo.modifier import Modifier, Velocity


@dataclass(frozen=True, kw_only=True)
class KnownFrames(Modifier):
    """What the model sees of `count` known latent frames from `first` on, and at which time.

    noise: of 1000, mixed anew into the known frames in every step, and their timestep; 0 shows them as they are.
    seed: of that noise.
    """

    first: int
    count: int
    noise: int
    seed: int

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The velocity of frames at times of their own."""
        generator = torch.Generator().manual_seed(self.seed)
        known = slice(self.first, self.first + self.count)

        def forced(latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
            times = timestep.expand(latents.shape[1]).clone()
            times[known] = float(self.noise)
            if self.noise:
                latents = latents.clone()
                frames = latents[:, known]
                fresh = torch.randn(frames.shape, generator=generator).to(latents)
                latents[:, known] = torch.lerp(frames, fresh, self.noise / 1000)
            return velocity(latents, times, step)

        return forced
