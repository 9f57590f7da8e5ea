"""FreeInit: several runs, each from noise that keeps the low frequencies of the video before.

Models are trained on noise in which a trace of the video is left, and sample from pure noise; the gap shows as flicker.
Source: FreeInit (Wu et al. 2023; TianxingWu/FreeInit).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo.latents import add_noise, given_samples
from ..wanvideo.modifier import Modifier, Run
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.sampling import Start, prepare_start
from .frequencies import low_pass, mixed

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

# The video is noised up to the last training timestep, 999 of 1000.
SIGMA = 0.999


@dataclass(frozen=True, kw_only=True)
class FreeInit(Modifier):
    """Socket FREEINITARGS. iterations: runs in all; method: of FILTERS; the rest as in `low_pass`."""

    iterations: int = 3
    method: str = "ideal"
    order: int = 4
    spatial: float = 1.0
    temporal: float = 1.0

    def around_run(self, run: Run) -> Run:
        """Runs, each from the video of the one before; samples that are connected stand for the first."""
        return partial(self._iterate, run)

    def _iterate(self, run: Run, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        _check(request)
        generator = torch.Generator().manual_seed(request.seed)
        start = prepare_start(request, request.schedule.fresh(), generator)
        noise = start.latents
        video = given_samples(request.samples or {}, noise.shape, request.image.ends)
        asked, left = request, self.iterations
        if video is not None and left > 1:
            asked, left = self._again(request, start, video, generator), left - 1
        for after in reversed(range(left)):
            log.info("FreeInit: %d more %s.", after, "run" if after == 1 else "runs")
            result = run(replace(asked, force_offload=request.force_offload and not after), host)
            if after:
                generator.set_state(result[0]["generator_state"])
                asked = self._again(request, start, result[0]["samples"][0], generator)
        return result

    def _again(self, request: SampleRequest, start: Start, video: Tensor, generator: torch.Generator) -> SampleRequest:
        """The request from new noise, whose low frequencies are those of the noised video [C, F, H, W]."""
        noise = start.latents
        fresh = torch.randn(noise.shape, generator=generator)
        mask = low_pass(noise.shape[1:], self.method, order=self.order, spatial=self.spatial, temporal=self.temporal)
        latents = mixed(add_noise(video, noise, SIGMA), fresh, mask)
        samples = {**(request.samples or {}), "samples": latents[None], "generator_state": generator.get_state()}
        if start.original is not None:
            samples["original_image"] = start.original
        return replace(request, samples=samples, add_noise_to_samples=False)


def _check(request: SampleRequest) -> None:
    if request.image.loop is not None:
        raise ValueError(
            "FreeInit makes one video anew from better noise, but these image embeds make theirs in a loop of windows: "
            "disconnect freeinit_args."
        )
    if any(modifier.replaces_start for modifier in request.modifiers):
        raise ValueError(
            "FreeInit makes a run's noise better, but something connected begins the run in a way of its own (Time-to-"
            "move, or frames of an earlier clip): disconnect freeinit_args or that."
        )
    if request.schedule.first_index > 0 or request.schedule.spec.denoise_strength < 1:
        raise ValueError(
            "FreeInit begins every run from noise, but start_step or denoise_strength lets this sampler begin later: "
            "connect freeinit_args to the sampler of the first steps, or set start_step to 0 and denoise_strength to 1."
        )
