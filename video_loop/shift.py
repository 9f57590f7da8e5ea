"""Videos whose end leads into their start: the model sees the frames begin at another place in every step.

Source: Mobius (Bi et al. 2025; YisuiTT/Mobius), latent shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..wanvideo.conditioning import Step
from ..wanvideo.modifier import Modifier, Run, Velocity
from ..wanvideo.request import Latent, SampleRequest

if TYPE_CHECKING:
    from ..host import Host


@dataclass(frozen=True, kw_only=True)
class LatentShift(Modifier):
    """Socket LOOPARGS. skip: latent frames by which the start moves on after every step of the range (0..1)."""

    skip: int = 6
    start_percent: float = 0.0
    end_percent: float = 1.0

    def shift(self, step: Step) -> int:
        """Frames by which the video is turned in this step: one skip for every step of the run before it that acted."""
        if not self._acts(step):
            return 0
        first = step.index - step.in_run
        before = (Step(index=index, total=step.total) for index in range(first, step.index))
        return self.skip * sum(self._acts(earlier) for earlier in before)

    def around_run(self, run: Run) -> Run:
        """The run, whose results say that they are a ring, for the decoder to close."""

        def marked(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
            result, clean = run(request, host)
            return {**result, "looped": True}, {**clean, "looped": True}

        return marked

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The velocity of the turned video, turned back. Timesteps of single frames turn with their frames."""

        def shifted(latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
            frames = self.shift(step) % latents.shape[1]
            if not frames:
                return velocity(latents, timestep, step)
            times = timestep.roll(-frames) if timestep.dim() else timestep
            return velocity(latents.roll(-frames, dims=1), times, step).roll(frames, dims=1)

        return shifted

    def _acts(self, step: Step) -> bool:
        return step.within(self.start_percent, self.end_percent)
