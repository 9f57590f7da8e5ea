"""Time-to-move: a crude video leads the first steps, in a mask for longer than elsewhere.

Source: time-to-move/TTM (pipelines/wan_pipeline.py); Time-to-Move (Singer et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Generator, Tensor

from ..wanvideo.latents import add_noise
from ..wanvideo.modifier import Modifier, Run, Start
from ..wanvideo.schedulers import Schedule

if TYPE_CHECKING:
    from ..host import Host
    from ..wanvideo.request import Latent, SampleRequest

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Led:
    """LatentHook: the reference [C, F, H, W], as noisy as the step's result, in the mask [1, F, H, W] for `steps`."""

    reference: Tensor
    noise: Tensor
    mask: Tensor
    schedule: Schedule
    steps: int

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Nothing to do."""
        return latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """The reference where the mask is 1, at the time of the next step; clean behind the last one."""
        if index >= self.steps:
            return latents
        reference = noised(self.reference, self.noise, self.schedule, index + 1).to(latents)
        mask = self.mask.to(latents)
        return latents * (1 - mask) + reference * mask


def noised(reference: Tensor, noise: Tensor, schedule: Schedule, index: int) -> Tensor:
    """The reference at the timestep of a step, counted within the run; behind the schedule's last step as it is."""
    place = schedule.first_index + index
    time = schedule.all_timesteps[place] / TRAIN_STEPS if place < schedule.total else 0.0
    return add_noise(reference, noise, time)


@dataclass(frozen=True)
class TimeToMove(Modifier):
    """reference [C, F, H, W]: latents of the crude video; mask [1, F, H, W]: 1 where it leads until `end_step`.

    start_step, end_step: of the whole schedule. Sampling begins at start_step, from the noised reference.
    """

    replaces_start: ClassVar[bool] = True
    reference: Tensor
    mask: Tensor
    start_step: int
    end_step: int

    def around_run(self, run: Run) -> Run:
        """A run without the steps before start_step. Raises ValueError where none is left."""

        def later(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
            skipped = self.start_step - request.schedule.first_index
            if skipped > 0:
                request = replace(request, schedule=request.schedule.later(skipped))
            return run(request, host)

        return later

    def begin(self, start: Start, schedule: Schedule, generator: Generator) -> Start:
        """From the reference, unless this run is behind end_step. Raises ValueError for a video of another size."""
        shapes = tuple(start.latents.shape), tuple(self.reference.shape), tuple(self.mask.shape)
        if shapes[0] != shapes[1] or shapes[0][1:] != shapes[2][1:]:
            raise ValueError(
                f"The video's latents are {shapes[0]}, but TTM's reference_latents are {shapes[1]} and its mask is "
                f"{shapes[2]} in latents: give all the same width, height and number of frames."
            )
        steps = self.end_step - schedule.first_index
        if steps <= 0:
            return start
        led = Led(self.reference, start.noise, self.mask, schedule, steps)
        return start._replace(latents=noised(self.reference, start.noise, schedule, 0), hooks=(*start.hooks, led))
