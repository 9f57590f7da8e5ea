"""Speech to video of any length, in windows: each has the last frames of those before it as packed tokens.

Source: Wan-Video/Wan2.2 (wan/speech2video). The first window has nothing before it and is decoded behind the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo import conditioning
from ..wanvideo.denoise import denoise
from ..wanvideo.footage import MemoryFootage, check_room
from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.guidance import Conditions
from ..wanvideo.images import to_images
from ..wanvideo.latents import start_noise
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.sampling import RunWatcher, active_model, make_denoiser, readable_payloads
from ..wanvideo.window_loop import check_decoded, check_last_window, check_windows, make_windows
from .extension import SpeechToVideo

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

# A window of 80 frames follows on 73, the number that the model was trained with.
FEWER_BEFORE = 7
# Frames that the first latent frame behind a reference does not have.
LOST_FIRST = VAE_TIME_STRIDE - 1
LEAST_WINDOW = 2 * VAE_TIME_STRIDE


@dataclass(frozen=True, kw_only=True)
class SpeechLoop:
    """What the sampler runs (`Loop`). window_frames: a multiple of 4. vae: encodes what windows follow on."""

    vae: WanVAE
    window_frames: int

    def __post_init__(self) -> None:
        """Raises ValueError for a size that is not whole latent frames."""
        if self.window_frames % VAE_TIME_STRIDE or self.window_frames < LEAST_WINDOW:
            raise ValueError(
                f"frame_window_size must be a multiple of {VAE_TIME_STRIDE}, and {LEAST_WINDOW} or more, with "
                f"enable_framepack, not {self.window_frames}: 80 is what the model was trained on."
            )

    @property
    def past_frames(self) -> int:
        """Frames that a window follows on."""
        return self.window_frames - FEWER_BEFORE

    @property
    def latents(self) -> int:
        """Latent frames of a window."""
        return self.window_frames // VAE_TIME_STRIDE

    def run(self, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        """As `run_loop`."""
        return run_loop(request, host)


def run_loop(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
    """Sample all windows: two LATENT dicts with `video` [frames, H, W, 3] in -1..1, and the last window's latents.

    Raises ValueError where inputs are missing or do not fit.
    """
    speech = request.find(SpeechToVideo)
    if speech is None or speech.audio is None:
        raise ValueError("The loop of S2V needs speech: connect audio_encoder_output to WanVideoAddS2VEmbeds.")
    check_windows(request, asked_by="enable_framepack", remedy="turn it off in WanVideoAddS2VEmbeds")
    loop: SpeechLoop = request.image.loop
    count = speech.audio.shape[-1] // loop.window_frames
    _, _, *sides = request.image.latent_shape
    frames = count * loop.window_frames - LOST_FIRST
    log.info("Sampling %d frames in %d windows of %dx%d latents.", frames, count, *reversed(sides))
    factor = loop.vae.spatial_factor
    check_room(frames, *(factor * side for side in sides), remedy="make the speech shorter, or the picture smaller")
    maker = WindowMaker(request, host)
    maker.check()
    ends = [0, *(number * loop.window_frames - LOST_FIRST for number in range(1, count + 1))]
    video = make_windows(
        request,
        host,
        maker.frames,
        spans=[range(*pair) for pair in pairwise(ends)],
        size=(loop.latents, *sides),
        vae=loop.vae,
        footage=MemoryFootage(frames),
    )
    result: Latent = {"samples": maker.latents[None], "video": video}
    return result, dict(result)


class WindowMaker:
    """Makes the windows of one run in turn; holds the frames that the next one follows on."""

    def __init__(self, request: SampleRequest, host: Host) -> None:
        self.request, self.host = request, host
        self.loop: SpeechLoop = request.image.loop
        self.speech: SpeechToVideo = request.find(SpeechToVideo)
        self.latents = torch.empty(0)
        self._past: Tensor | None = None
        factor, (_, _, *sides) = self.loop.vae.spatial_factor, request.image.latent_shape
        self._recent = torch.zeros(3, self.loop.past_frames, *(factor * side for side in sides))

    def frames(self, index: int, watcher: RunWatcher) -> Iterator[Tensor]:
        """The frames [n, H, W, 3] in 0..1 of window `index`."""
        loop = self.loop
        if index:
            self._past = loop.vae.encode(self._recent, quiet=True)[None]
        self.latents = self._sample(index, watcher)
        before = self._past if index else self.speech.reference
        parts = (self.latents,) if before is None else (before[0].float().cpu(), self.latents)
        count = loop.window_frames if index else loop.window_frames - LOST_FIRST
        frames = loop.vae.decode(torch.cat(parts, dim=1), quiet=True)[:, -count:]
        check_decoded(frames, index * loop.window_frames)
        self._recent = torch.cat((self._recent, frames.clamp(-1, 1)), dim=1)[:, -loop.past_frames :]
        yield to_images(frames)

    def _sample(self, index: int, watcher: RunWatcher) -> Tensor:
        """The window's latents [z, F, h, w]."""
        request = self.request
        channels, _, *sides = request.image.latent_shape
        generator = torch.Generator().manual_seed(request.seed + index)
        size, schedule = (self.loop.latents, *sides), request.schedule.fresh()
        with active_model(request, size, request.guidance.most_passes(len(schedule))) as transformer:
            payloads = tuple(self._parts(index, readable_payloads(request, transformer)))
            text = request.text
            conditions = Conditions(
                positive=text.positive[min(index, len(text.positive) - 1)],
                negative=text.negative[0] if text.negative else None,
                payloads=payloads,
            )
            result = denoise(
                make_denoiser(request, transformer, conditions=conditions),
                schedule,
                latents=schedule.from_noise(start_noise((channels, *size), generator)),
                generator=generator,
                modifiers=request.modifiers,
                watcher=watcher,
            )
        return result.latents.float().cpu()

    def check(self) -> None:
        """Raises ValueError where another system brings less than the video needs, before the last window does."""
        last = self.speech.audio.shape[-1] // self.loop.window_frames - 1
        check_last_window(self.request, self._seen(last), apart=SpeechToVideo)

    def _seen(self, index: int) -> conditioning.Window:
        """Window `index` as other systems see it: these latents of a longer video."""
        first = index * self.loop.latents
        latents = range(first, first + self.loop.latents)
        pixels = range(VAE_TIME_STRIDE * first, VAE_TIME_STRIDE * (latents[-1]) + 1)
        return conditioning.Window(tuple(latents), tuple(pixels), end=latent_frames(self.request.image.num_frames))

    def _parts(self, index: int, payloads: tuple[conditioning.Payload, ...]) -> Iterator[conditioning.Payload]:
        """What belongs to a window."""
        for payload in payloads:
            part = self._heard(index) if isinstance(payload, SpeechToVideo) else payload.window(self._seen(index))
            if part is not None:
                yield part

    def _heard(self, index: int) -> SpeechToVideo:
        """Speech and poses of a window, the past from the second one on."""
        loop, speech = self.loop, self.speech
        size = loop.window_frames
        return replace(
            speech,
            audio=speech.audio[..., index * size : (index + 1) * size],
            pose=None if speech.pose is None else self._poses(index),
            past=self._past,
            lead=loop.past_frames,
            lead_latents=-(-loop.past_frames // VAE_TIME_STRIDE),
        )

    def _poses(self, index: int) -> Tensor:
        """Latents [1, z, F, h, w] of a window's poses; behind the end of the pose video there is black."""
        count = self.loop.latents
        part = self.speech.pose[:, :, index * count : (index + 1) * count].cpu()
        missing = count - part.shape[2]
        if not missing:
            return part
        black = -torch.ones(3, 1 + VAE_TIME_STRIDE * missing, *self._recent.shape[2:])
        return torch.cat((part, self.loop.vae.encode(black, quiet=True)[None, :, 1:].to(part)), dim=2)
