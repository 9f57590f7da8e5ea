"""A run of the sampler with sound: the same schedule takes the sound's latents along with the video's.

Source: character-ai/Ovi (ovi_fusion_engine.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo.conditioning import Row, Step
from ..wanvideo.latents import add_noise, noise_shape, start_noise
from ..wanvideo.modifier import Combine, Modifier, Run, Velocity
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.schedulers import Schedule
from .stream import OviSound, OviText, SoundStream

if TYPE_CHECKING:
    from ..host import Host

# In a LATENT dict: [1, channels, L], or zeros [L, channels] that only say how long the sound is.
SOUND = "latent_ovi_audio"
# Latents of 5 seconds: 31.25 a second.
FIVE_SECONDS = 157


@dataclass(frozen=True)
class SoundRun(Modifier):
    """Adds sound of so many channels to every run."""

    channels: int

    def around_run(self, run: Run) -> Run:
        """The run with sound in its results."""
        return partial(self._run, run)

    def _run(self, run: Run, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        # The seed's numbers go to the video first, as they would without sound.
        generator = torch.Generator().manual_seed(request.seed)
        start_noise(noise_shape(request.image, request.model.config), generator)
        guidance = request.find(OviText)
        stream = SoundStream(self._start(request, generator), scales=None if guidance is None else guidance.scales)
        sound = OviSound(stream, None if guidance is None else guidance.negative)
        if guidance is not None:
            others = tuple(payload for payload in request.text.payloads if not isinstance(payload, OviText))
            request = replace(request, text=replace(request.text, payloads=others))
        request = replace(
            request,
            payloads=(*request.payloads, sound),
            modifiers=(*request.modifiers, SoundSteps(stream, request.schedule.fresh(), generator)),
        )
        results = run(request, host)
        latents = stream.audio.T[None].cpu()
        return tuple({**result, SOUND: latents} for result in results)

    def _start(self, request: SampleRequest, generator: torch.Generator) -> Tensor:
        """The sound's latents [L, channels] before the first step. Raises ValueError for another number of channels."""
        given = (request.samples or {}).get(SOUND)
        if given is None:
            given = torch.zeros(FIVE_SECONDS, self.channels)
        latents = given[0].T.float() if given.dim() == 3 else given.float()
        if latents.dim() != 2 or latents.shape[1] != self.channels:
            raise ValueError(
                f"The sound's latents are {tuple(given.shape)} where this model has {self.channels} channels: make "
                "them with WanVideoEmptyMMAudioLatents or WanVideoEncodeOviAudio."
            )
        if not latents.any():
            return request.schedule.from_noise(start_noise(latents.shape, generator))
        if request.noises_samples:
            return add_noise(latents, start_noise(latents.shape, generator), request.schedule.level(0))
        return latents.cpu()


@dataclass(frozen=True)
class SoundSteps(Modifier):
    """Guides the sound's predictions and takes its steps. generator: for solvers that draw noise."""

    stream: SoundStream
    schedule: Schedule
    generator: torch.Generator

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The video's velocity; the sound takes its own step behind it."""

        def joined(latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
            self.stream.velocity = None
            result = velocity(latents, timestep, step)
            while self.stream.steps <= step.in_run:
                self._step(result.device)
            return result

        return joined

    def around_guidance(self, combine: Combine) -> Combine:
        """The video's guidance, and the sound's beside it."""

        def both(rows: Sequence[Row], predictions: Sequence[Tensor], step: Step) -> Tensor:
            self.stream.guide(rows, step)
            return combine(rows, predictions, step)

        return both

    def _step(self, device: torch.device) -> None:
        """One step; the sound stays where it is in steps in which the model did not run."""
        stream = self.stream
        audio = stream.audio.to(device)
        velocity = torch.zeros_like(audio) if stream.velocity is None else stream.velocity
        stream.audio = self.schedule.step(velocity, stream.steps, audio, self.generator)
        stream.steps += 1
