"""How a video goes on from an earlier one in One-to-All: its first latent frames are given, and stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..wanvideo.latents import GivenLatents
from ..wanvideo.modifier import Modifier, Start
from ..wanvideo.schedulers import Schedule


@dataclass(frozen=True)
class TokenReplacement(Modifier):
    """The model sees the first frames clean, at time 0, and no step moves them.

    latents [1, z, n, h, w]: the last frames of the earlier video; first: the latent frame that they begin at.
    """

    replaces_start: ClassVar[bool] = True
    latents: Tensor
    first: int = 0

    def begin(self, start: Start, schedule: Schedule, generator: torch.Generator) -> Start:
        """Raises ValueError where the latents are of another size, or leave nothing to make."""
        made = start.latents.shape[1] - self.first - self.latents.shape[2]
        if made < 1:
            raise ValueError(
                f"prev_latents have {self.latents.shape[2]} latent frames and the video has no more: give fewer "
                "frames of the earlier video, or make num_frames larger."
            )
        held = GivenLatents.placed(((self.first, self.latents),), start.latents.shape)
        return start._replace(
            latents=held.before(start.latents, 0),
            hooks=(*start.hooks, held),
            frame_times={**start.frame_times, **dict.fromkeys(held.frames, 0.0)},
        )
