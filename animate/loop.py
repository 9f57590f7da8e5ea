"""A character's video of any length, in windows: each begins with the last frame of the one before.

Source: Wan-Video/Wan2.2 (wan/animate).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..multitalk.colormatch import match_colors
from ..wanvideo import conditioning
from ..wanvideo.denoise import denoise
from ..wanvideo.footage import MemoryFootage, check_room
from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.guidance import Conditions
from ..wanvideo.images import to_images
from ..wanvideo.latents import start_noise
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.sampling import RunWatcher, active_model, make_denoiser, readable_payloads
from ..wanvideo.window_loop import check_decoded, check_last_window, check_windows, make_windows, windows_generator
from .extension import NEEDS, Character
from .footage import Footage

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")


@dataclass(frozen=True, kw_only=True)
class CharacterLoop:
    """What the sampler runs (`Loop`). frames: of the whole video; window_frames: 4n+1 and more than 1; colormatch: of
    every frame to the reference."""

    footage: Footage
    frames: int
    window_frames: int
    colormatch: str = "disabled"

    @property
    def windows(self) -> int:
        """How many there are: neighbors share a frame, and the last one may end behind the video."""
        return -(-(self.frames - 1) // (self.window_frames - 1))

    def run(self, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        """As `run_loop`."""
        return run_loop(request, host)


def run_loop(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
    """Sample all windows: two LATENT dicts with `video` [frames, H, W, 3] in -1..1, and the last window's latents.

    Raises ValueError where inputs are missing or do not fit.
    """
    check_windows(request, asked_by="a frame_window_size below the number of frames", remedy="raise it")
    loop: CharacterLoop = request.image.loop
    size = loop.footage.shape(loop.window_frames)[1:]
    log.info("Sampling %d frames in %d windows of %dx%d latents.", loop.frames, loop.windows, size[2], size[1])
    height, width = loop.footage.reference.shape[2:]
    check_room(loop.frames, height, width, remedy="ask for fewer frames, or a smaller picture")
    maker = WindowMaker(request, host)
    maker.check()
    starts = (index * (loop.window_frames - 1) for index in range(loop.windows))
    video = make_windows(
        request,
        host,
        maker.frames,
        spans=[range(start, start + loop.window_frames) for start in starts],
        size=size,
        vae=loop.footage.vae,
        footage=MemoryFootage(loop.frames),
    )
    result: Latent = {"samples": maker.latents[None], "video": video}
    return result, dict(result)


class WindowMaker:
    """Makes the windows of one run in turn; holds the frame that the next one begins with."""

    def __init__(self, request: SampleRequest, host: Host) -> None:
        self.request, self.host = request, host
        self.loop: CharacterLoop = request.image.loop
        step = self.loop.window_frames - 1
        self.footage = self.loop.footage.lasting(self.loop.windows * step + 1)
        self.generator = windows_generator(request)
        self.latents = torch.empty(0)
        self._reference = to_images(self.footage.reference)[0]
        self._last: Tensor | None = None

    def frames(self, index: int, watcher: RunWatcher) -> Iterator[Tensor]:
        """The new frames [n, H, W, 3] in 0..1 of window `index`."""
        loop, start = self.loop, index * (self.loop.window_frames - 1)
        part = self.footage.part(range(start, start + loop.window_frames), self._last)
        self.latents = self._sample(index, part, watcher)
        video = self.footage.vae.decode(self.latents[:, 1:], tile=self.footage.tile, quiet=True)
        check_decoded(video, start)
        images = match_colors(to_images(video)[1 if index else 0 :], self._reference, loop.colormatch)
        self._last = images[-1:].movedim(-1, 0) * 2 - 1
        yield images

    def check(self) -> None:
        """Raises ValueError where a system brings less than the video needs, before the last window does."""
        check_last_window(self.request, self._seen(self.loop.windows - 1))

    def _seen(self, index: int) -> conditioning.Window:
        """Window `index` as payloads see it."""
        size = latent_frames(self.loop.window_frames)
        first = index * (size - 1)
        pixels = range(VAE_TIME_STRIDE * first, VAE_TIME_STRIDE * (first + size - 1) + 1)
        latents = (0, *range(first + 1, first + size + 1))
        return conditioning.Window(latents, tuple(pixels), leading=1, end=latent_frames(self.loop.frames))

    def _sample(self, index: int, character: Character, watcher: RunWatcher) -> Tensor:
        """The window's latents [z, 1 + F, h, w], the reference's first."""
        request, text = self.request, self.request.text
        shape, schedule = self.footage.shape(self.loop.window_frames), request.schedule.fresh()
        with active_model(request, shape[1:], request.guidance.most_passes(len(schedule))) as transformer:
            if not transformer.reads(character):
                raise ValueError(NEEDS)
            parts = (payload.window(self._seen(index)) for payload in readable_payloads(request, transformer))
            conditions = Conditions(
                positive=text.positive[min(index, len(text.positive) - 1)],
                negative=text.negative[0] if text.negative else None,
                payloads=(character, *(part for part in parts if part is not None)),
            )
            result = denoise(
                make_denoiser(request, transformer, conditions=conditions),
                schedule,
                latents=schedule.from_noise(start_noise(shape, self.generator)),
                generator=self.generator,
                modifiers=request.modifiers,
                watcher=watcher,
            )
        return result.latents.float().cpu()
