"""Pusa: frames that are given before sampling keep a part of every step's noise, so that the video may change them.

Source: Yaofang-Liu/Pusa-VidGen (schedulers/flow_match_pusa_v2v.py); Pusa (Liu et al. 2025). A frame without noise is
the core's: schedules that time frames hold it at time 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..wanvideo.latents import GivenLatents, add_noise
from ..wanvideo.modifier import Modifier, Start
from ..wanvideo.schedulers import Schedule

log = logging.getLogger("wanvideo")


class NoisyFrames:
    """LatentHook: frames that are noised anew before each of the first `steps`, and moved from where they are.

    parts: latent frame -> its part (0..1) of the noise. The schedule's solver must be Euler's: a frame's step is the
    one that begins at the time of the grid nearest to the frame's own, times its part.
    """

    def __init__(self, parts: Mapping[int, float], schedule: Schedule, generator: Generator, *, steps: int) -> None:
        self._parts, self._schedule, self._generator, self._steps = parts, schedule, generator, steps
        self._before: Tensor | None = None

    def before(self, latents: Tensor, index: int) -> Tensor:
        """The latents with noise mixed into the frames; every frame draws noise for the whole video."""
        latents, sigma = latents.clone(), self._schedule.sigmas[index].item()
        for frame, part in self._parts.items() if index < self._steps else ():
            noise = torch.randn(latents.shape, generator=self._generator)[:, frame].to(latents)
            latents[:, frame] = add_noise(latents[:, frame], noise, sigma * part)
        self._before = latents
        return latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """The latents with the frames moved by steps of their own."""
        sigmas, latents = self._schedule.sigmas, latents.clone()
        whole = sigmas[index + 1] - sigmas[index]
        for frame, part in self._parts.items():
            nearest = (self._schedule.timesteps - self._schedule.timesteps[index] * part).abs().argmin()
            share = part * (sigmas[nearest + 1] - sigmas[nearest]) / whole
            latents[:, frame] = torch.lerp(self._before[:, frame], latents[:, frame], share.item())
        return latents


@dataclass(frozen=True)
class FrameNoise(Modifier):
    """multipliers: parts (0..1) of the noise: one for all given frames, one for each in the order in which they were
    given, or one for each latent frame of the video. noisy_steps: how many steps noise is mixed in; -1 for all.
    """

    multipliers: tuple[float, ...]
    noisy_steps: int = -1

    def begin(self, start: Start, schedule: Schedule, generator: Generator) -> Start:
        """Frames with a part above 0 are no longer held. Raises ValueError for other schedulers and too few parts."""
        if not schedule.times_frames:
            raise ValueError(
                f"WanVideoAddPusaNoise works with the scheduler 'flowmatch_pusa', not '{schedule.spec.name}': choose "
                "it, or disconnect the node."
            )
        held = next((hook for hook in start.hooks if isinstance(hook, GivenLatents)), None)
        if held is None:
            log.warning("There are no extra latents, so WanVideoAddPusaNoise has no effect.")
            return start
        parts = self._parts(held.frames, start.latents.shape[1])
        noisy = {frame: part for frame, part in parts.items() if part > 0}
        steps = len(schedule) if self.noisy_steps < 0 else self.noisy_steps
        hooks = [_without(hook, noisy) if hook is held else hook for hook in start.hooks]
        hooks.append(NoisyFrames(noisy, schedule, generator, steps=steps))
        return start._replace(hooks=tuple(hooks), frame_times=parts)

    def _parts(self, given: tuple[int, ...], frames: int) -> dict[int, float]:
        """Given latent frame -> its part."""
        if len(self.multipliers) == frames:
            return {frame: self.multipliers[frame] for frame in given}
        multipliers = self.multipliers * len(given) if len(self.multipliers) == 1 else self.multipliers
        if len(multipliers) < len(given):
            raise ValueError(
                f"noise_multipliers has {len(multipliers)} numbers for {len(given)} given latent frames: give one for "
                "all of them, or one for each."
            )
        return dict(zip(given, multipliers, strict=False))


def _without(held: GivenLatents, noisy: Mapping[int, float]) -> GivenLatents:
    """The given frames that stay as they are."""
    frames = ((first + at, part[:, at : at + 1]) for first, part in held.parts for at in range(part.shape[1]))
    return GivenLatents(tuple((frame, latents) for frame, latents in frames if frame not in noisy))
