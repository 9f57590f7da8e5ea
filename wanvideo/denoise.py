"""The loop over a schedule: noise to latents, with hooks around each step and a guard against NaN.

The plain sampler (`sampling.py`) and loops of windows run it. Latents are [C, F, H, W]
float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .conditioning import Step
from .diagnosis import origin
from .guidance import Denoiser
from .modifier import LatentHook, Modifier, Velocity
from .schedulers import Schedule
from .shard import ALONE
from .windows import WindowedDenoiser


class Pace(NamedTuple):
    """Seconds that the first step of a schedule took, and each of the others on average; None where there are none."""

    first: float
    later: float | None


class Watcher(Protocol):
    """Told about every step: cancellation, progress, preview. May raise to stop the run."""

    def begin(self, index: int) -> None:
        """Before the model runs."""

    def end(self, index: int, clean: Tensor) -> None:
        """After the step; clean: the estimate of the finished latents [C, F, H, W]."""

    def finish(self, pace: Pace) -> None:
        """After the last step."""


class Denoised(NamedTuple):
    """latents at the end of the schedule, and the last estimate of the clean ones, [C, F, H, W] float32."""

    latents: Tensor
    clean: Tensor


@torch.no_grad()
def denoise(
    denoiser: Denoiser | WindowedDenoiser,
    schedule: Schedule,
    *,
    latents: Tensor,
    generator: torch.Generator,
    hooks: Sequence[LatentHook] = (),
    modifiers: Sequence[Modifier] = (),
    frame_times: Mapping[int, float] | None = None,
    watcher: Watcher | None = None,
) -> Denoised:
    """Run every step of a fresh `schedule` on `latents` [C, F, H, W].

    generator: CPU generator for solvers that draw noise. hooks run in order. modifiers: around the velocity, the first
    outermost. frame_times: the part of the timestep at which the model sees a latent frame, where it is not all of
    it; 0 for frames that are given and stay (images of the 5B). The result is on the denoiser's device.
    Raises NotFiniteError if the model's output is not finite.
    """
    latents = latents.to(denoiser.device, torch.float32)
    clean, parts = latents, dict(frame_times or {})
    still = [frame for frame, part in parts.items() if part == 0]
    free = [frame for frame in range(latents.shape[1]) if frame not in still] if still else slice(None)
    tripwire = _Tripwire(schedule)
    velocity_of: Velocity = denoiser
    for modifier in reversed(modifiers):
        velocity_of = modifier.around_velocity(velocity_of)
    # The device is done with what is timed: the tripwire asks it after the first and the last step.
    began = first = time.perf_counter()
    for index, (timestep, step) in enumerate(zip(schedule.timesteps, schedule.places(), strict=True)):
        if watcher is not None:
            watcher.begin(index)
        for hook in hooks:
            latents = hook.before(latents, index)
        given, timesteps = latents, _frame_timesteps(timestep, latents.shape[1], parts)
        velocity = velocity_of(given, timesteps, step)
        clean = latents - schedule.sigmas[index] * velocity
        clean[:, still] = latents[:, still]
        # Solvers that draw noise draw it for the other frames alone, as saved graphs have it: a seed means one video.
        moved = schedule.step(velocity[:, free], index, latents[:, free], generator)
        # Solvers hold on to the latents that they were given.
        latents = latents.clone()
        latents[:, free] = moved
        for hook in hooks:
            latents = hook.after(latents, index)
        tripwire.look(velocity, latents, partial(_origin, denoiser, given, timesteps, step))
        first = time.perf_counter() if index == 0 else first
        if watcher is not None:
            watcher.end(index, clean)
    denoiser.report()
    if watcher is not None:
        others = len(schedule) - 1
        watcher.finish(Pace(first - began, (time.perf_counter() - first) / others if others else None))
    return Denoised(latents, clean)


def _origin(denoiser: Denoiser | WindowedDenoiser, latents: Tensor, timesteps: Tensor, step: Step) -> str | None:
    """Where the model's first NaN or infinity arises in this step."""
    denoiser.forget()
    # It stops at the first layer that is wrong, where other processes would wait for it: each looks alone.
    with denoiser.model.shared_by(ALONE):
        return origin(denoiser.model, lambda: denoiser(latents, timesteps, step))


def _frame_timesteps(timestep: Tensor, frames: int, parts: Mapping[int, float]) -> Tensor:
    if not parts:
        return timestep
    timesteps = timestep.repeat(frames)
    for frame, part in parts.items():
        timesteps[frame] *= part
    return timesteps


class NotFiniteError(ValueError):
    """The model, the solver or the VAE gave NaN or infinite values: the video would be black."""


class _Tripwire:
    """The guard against black videos. It looks at every step but asks the device after the first and the last one."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._steps: list[Tensor] = []

    def look(self, velocity: Tensor, latents: Tensor, second_look: Callable[[], str | None]) -> None:
        """Raises NotFiniteError, naming the first step that went wrong, and the layer if it is the first step.

        second_look: runs the step once more and says where it goes wrong.
        """
        self._steps.append(torch.stack((torch.isfinite(velocity).all(), torch.isfinite(latents).all())))
        if len(self._steps) not in (1, len(self._schedule)):
            return
        for index, (velocity_is, latents_are) in enumerate(torch.stack(self._steps).tolist()):
            at = f"step {index + 1} of {len(self._schedule)}"
            if not velocity_is:
                place = second_look() if len(self._steps) == 1 else None
                place = "" if place is None else f" ({place})"
                raise NotFiniteError(
                    f"The model's output was NaN or infinite at {at}{place}: choose base_precision bf16, another "
                    "attention_mode or another quantization in WanVideoModelLoader, and check that the model file is "
                    "complete."
                )
            if not latents_are:
                raise NotFiniteError(
                    f"The latents became NaN or infinite at {at} although the model's output was finite: check the "
                    "samples and sigmas that are connected, or choose another scheduler."
                )
