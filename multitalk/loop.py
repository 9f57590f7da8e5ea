"""Long talking video, window by window: every window goes on from the last frames of the one before.

Source: MeiGen-AI/InfiniteTalk (generate_infinitetalk) and MeiGen-AI/MultiTalk. Two ways to go on: InfiniteTalk keeps
the encoded motion frames in place at every step; MultiTalk re-noises them to the level of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..wanvideo.guidance import Conditions
from ..wanvideo.images import to_images
from ..wanvideo.latents import Inpainting, add_noise, change_mask, condition_channels, start_noise
from ..wanvideo.modules.vae import Tile
from ..wanvideo.payloads import VAE_TIME_STRIDE, LoopSettings, latent_frames, round_frames
from ..wanvideo.sampling import (
    LatentHook,
    RunWatcher,
    SampleRequest,
    conditionings,
    denoise,
    make_denoiser,
)
from .audio import MultiTalkEmbeds
from .colormatch import match_colors

if TYPE_CHECKING:
    from ..host import Host
    from ..wanvideo.modules.model import WanModel
    from ..wanvideo.schedulers import Schedule

log = logging.getLogger("wanvideo")


class Window(NamedTuple):
    """One window: its number and the absolute frames it covers."""

    index: int
    frames: range


def plan_windows(total: int, size: int, motion: int) -> list[Window]:
    """Windows of `size` frames that cover `total` frames; neighbours share `motion` frames."""
    windows = [Window(0, range(size))]
    while windows[-1].frames.stop < total:
        start = windows[-1].frames.stop - motion
        windows.append(Window(len(windows), range(start, start + size)))
    return windows


@dataclass(frozen=True)
class KeptMotion:
    """LatentHook of InfiniteTalk: the first latent frames are the motion frames, before and after every step."""

    motion: Tensor

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Motion frames in place."""
        return torch.cat((self.motion.to(latents), latents[:, self.motion.shape[1] :]), dim=1)

    def after(self, latents: Tensor, index: int) -> Tensor:
        """As before the step."""
        return self.before(latents, index)


@dataclass(frozen=True)
class NoisedMotion:
    """LatentHook of MultiTalk: the first latent frames are the motion frames at the noise level of the step."""

    motion: Tensor
    schedule: Schedule
    generator: torch.Generator

    def _placed(self, latents: Tensor, sigma: Tensor) -> Tensor:
        noise = start_noise(self.motion.shape, self.generator)
        noisy = add_noise(self.motion, noise, sigma)
        return torch.cat((noisy.to(latents), latents[:, self.motion.shape[1] :]), dim=1)

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Only the first step finds latents without motion frames."""
        return self._placed(latents, self.schedule.sigmas[0]) if index == 0 else latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """Motion frames at the level that the step reached."""
        return self._placed(latents, self.schedule.sigmas[index + 1])


class Footage:
    """The finished frames: 8-bit in memory, or pictures in a folder, at most `total`."""

    def __init__(self, folder: str, total: int) -> None:
        self._folder = Path(folder) if folder else None
        self._left = total
        self._count = 0
        self._parts: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Take frames [n, H, W, 3] in 0..1."""
        images = images[: self._left]
        self._left -= images.shape[0]
        frames = (images * 255).round().to(torch.uint8)
        if self._folder is None:
            self._parts.append(frames)
        else:
            self._write(frames)

    def _write(self, frames: Tensor) -> None:
        from PIL import Image

        if self._count == 0:
            self._set_aside_earlier()
        self._folder.mkdir(parents=True, exist_ok=True)
        for frame in frames.numpy():
            path = self._folder / f"frame_{self._count:05d}.png"
            partial = path.with_suffix(".part")
            Image.fromarray(frame).save(partial, format="PNG")
            partial.replace(path)
            self._count += 1

    def _set_aside_earlier(self) -> None:
        """Give an earlier run's folder another name: ComfyUI keeps the path of a node whose inputs did not change."""
        if not any(self._folder.glob("frame_*.png")):
            return
        names = (self._folder.with_name(f"{self._folder.name}_{number}") for number in count(1))
        earlier = next(name for name in names if not name.exists())
        self._folder.rename(earlier)
        log.info("The frames of the run before are now in %s.", earlier)

    def video(self) -> Tensor:
        """All frames [n, H, W, 3] in -1..1; one black frame where they went to a folder."""
        if self._folder is not None:
            return torch.full((1, 64, 64, 3), -1.0)
        return torch.cat(self._parts).float().div_(127.5).sub_(1)


def run_loop(request: SampleRequest, host: Host) -> tuple[dict[str, object], dict[str, object]]:
    """Sample a whole talking video: two LATENT dicts with `video` [frames, H, W, 3] in -1..1 and `output_path`.

    The video is as long as the speech. Raises ValueError where inputs are missing or do not fit.
    """
    loop, speech = loop_settings(request.image.loop, request.model.talk_kind), request.multitalk
    request = replace(request, image=replace(request.image, loop=loop))
    if speech is None:
        raise ValueError("A long talking video needs speech: connect multitalk_embeds to the sampler.")
    if loop.start_images is None:
        raise ValueError("A long talking video needs a picture: connect start_image to WanVideoImageToVideoMultiTalk.")
    if request.text is None or not request.text.positive:
        raise ValueError("There is no prompt: connect text_embeds (WanVideoTextEncode) to the sampler.")
    total = speech.num_frames
    windows = plan_windows(total, loop.window_frames, loop.motion_frames)
    log.info("Sampling %d frames in %d windows of %dx%d.", total, len(windows), loop.width, loop.height)
    footage = Footage(loop.output_path, total)
    maker = WindowMaker(request, host)
    steps = len(request.schedule)
    try:
        with host.progress(len(windows) * steps, "Sampling") as progress:
            watcher = RunWatcher(host, progress, request.model.set_step)
            for window, fresh in maker.windows(windows, watcher):
                footage.add(fresh)
                log.info("Window %d of %d is finished.", window.index + 1, len(windows))
    finally:
        loop.vae.managed.release()
        if request.force_offload:
            request.model.managed.release()
    result = {"samples": maker.latents[None], "video": footage.video(), "output_path": loop.output_path}
    return result, dict(result)


class WindowMaker:
    """Makes the windows of one run in turn; holds what one window hands to the next."""

    def __init__(self, request: SampleRequest, host: Host) -> None:
        self.request = request
        self.loop: LoopSettings = request.image.loop
        self.host = host
        self.speech: MultiTalkEmbeds = request.multitalk
        self.generator = torch.Generator().manual_seed(request.seed)
        self.tile = Tile() if self.loop.tiled_vae else None
        self.tail: Tensor | None = None
        self.latents: Tensor = torch.empty(0)
        self._conditions_of: dict[int, tuple[Tensor, Tensor]] = {}

    def windows(self, windows: list[Window], watcher: RunWatcher) -> Iterator[tuple[Window, Tensor]]:
        """Each window with its new frames [n, H, W, 3] in 0..1."""
        for window in windows:
            watcher.note = f"Sampling audio indices {window.frames.start}-{window.frames.stop}"
            video = self._sample(window, watcher)
            images = match_colors(to_images(video), self._reference(window), self.loop.colormatch)
            repeated = 0 if window.index == 0 else self.loop.motion_frames
            self.tail = images[-self.loop.motion_frames :].movedim(-1, 0) * 2 - 1
            yield window, images[repeated:]

    def _picture_index(self, window: Window) -> int:
        """InfiniteTalk takes the next one of several pictures at every window."""
        return min(window.index, self.loop.start_images.shape[1] - 1) if self.loop.mode == "infinitetalk" else 0

    def _picture(self, window: Window) -> Tensor:
        """The start picture of a window [3, 1, H, W]."""
        index = self._picture_index(window)
        return self.loop.start_images[:, index : index + 1]

    def _reference(self, window: Window) -> Tensor:
        return to_images(self._picture(window))[0]

    def _sample(self, window: Window, watcher: RunWatcher) -> Tensor:
        """The window's video [3, F, H, W]."""
        request, loop = self.request, self.loop
        schedule = request.schedule.fresh()
        cond, mask, hooks = self._given(window, schedule)
        latents, inpainting = self._start(window, cond.shape[1:], schedule)
        with request.model.active() as transformer:
            channels = condition_channels(cond, mask, transformer.config)
            conditions = self._conditions(window, transformer, channels)
            result = denoise(
                make_denoiser(request, transformer, host=self.host, conditions=conditions),
                schedule,
                latents=latents,
                generator=self.generator,
                # Motion frames last: they hold also where a mask keeps the source video.
                hooks=(*inpainting, *hooks),
                watcher=watcher,
            )
        if loop.offload_between_windows:
            request.model.managed.release()
        self.latents = result.latents.float().cpu()
        return loop.vae.decode(self.latents, tile=self.tile)

    def _given(self, window: Window, schedule: Schedule) -> tuple[Tensor, Tensor, tuple[LatentHook, ...]]:
        """Condition latents, their mask, and the hook that holds the motion frames."""
        picture, tail = self._picture(window), self.tail
        motion = picture if tail is None else tail
        encoded = self.loop.vae.encode(motion, tile=self.tile)
        if self.loop.mode == "infinitetalk":
            return *self._condition_of(self._picture_index(window), picture), (KeptMotion(encoded),)
        hooks = () if tail is None else (NoisedMotion(encoded, schedule, self.generator),)
        return *self._condition(motion), hooks

    def _condition_of(self, index: int, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The condition of a picture, which windows share; only the latest is kept."""
        if index not in self._conditions_of:
            self._conditions_of = {index: self._condition(picture)}
        return self._conditions_of[index]

    def _condition(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded frames [z, F, h, w] of the given ones and grey, and their mask [4, F, h, w]."""
        size = self.loop.window_frames
        grey = given.new_zeros(3, size - given.shape[1], *given.shape[2:])
        cond = self.loop.vae.encode(torch.cat((given, grey), dim=1), tile=self.tile)
        mask = torch.zeros(VAE_TIME_STRIDE, *cond.shape[1:])
        mask[:, : latent_frames(given.shape[1])] = 1
        return cond, mask

    def _start(self, window: Window, size: torch.Size, schedule: Schedule) -> tuple[Tensor, tuple[LatentHook, ...]]:
        """Latents that the window begins with, and the hook that keeps the source video outside a noise mask."""
        noise = start_noise((self.loop.vae.latent_channels, *size), self.generator)
        source = self.request.samples or {}
        samples = source.get("samples")
        if samples is None:
            return noise, ()
        given = samples[0].float()
        if (given.shape[0], *given.shape[2:]) != (noise.shape[0], *noise.shape[2:]):
            raise ValueError(
                f"The samples are {tuple(samples.shape)} but a window's latents are {(1, *noise.shape)}: encode the "
                "source video at the width and height of WanVideoImageToVideoMultiTalk."
            )
        first = window.frames.start // VAE_TIME_STRIDE
        index = torch.arange(first, first + noise.shape[1]).clamp(max=given.shape[1] - 1)
        clean = given[:, index]
        latents = add_noise(clean, noise, schedule.sigmas[0]) if self.request.noises_samples else clean
        if source.get("noise_mask") is None:
            return latents, ()
        change = change_mask(_masks_of(source["noise_mask"], window.frames), noise.shape)
        return latents, (Inpainting(clean, noise, change, schedule),)

    def _conditions(self, window: Window, transformer: WanModel, channels: Tensor | None) -> Conditions:
        text = self.request.text
        return Conditions(
            positive=text.positive[min(window.index, len(text.positive) - 1)],
            negative=text.negative[0] if text.negative else None,
            channels=channels,
            conditionings=conditionings(self.request, transformer, self.speech.window(window.frames)),
        )


def _masks_of(masks: Tensor, frames: range) -> Tensor:
    """A noise mask's frames [n, H, W] for a window; a mask shorter than the video starts over."""
    flat = masks.reshape(-1, *masks.shape[-2:])
    return flat[torch.arange(frames.start, frames.stop) % flat.shape[0]]


def loop_settings(settings: LoopSettings, kind: str) -> LoopSettings:
    """Settings with counts that fit the VAE and a definite mode. kind: the model's, "infinitetalk" or "multitalk".

    window_frames and motion_frames are rounded down to 4n+1. Raises ValueError if a window brings nothing new.
    """
    window, motion = round_frames(settings.window_frames), round_frames(settings.motion_frames)
    if (window, motion) != (settings.window_frames, settings.motion_frames):
        log.info("The VAE works in 4n+1 frames: windows of %d frames, %d of them shared.", window, motion)
    if motion >= window:
        raise ValueError(f"motion_frame ({motion}) must be less than frame_window_size ({window}).")
    mode = kind if settings.mode == "auto" else settings.mode
    return replace(settings, window_frames=window, motion_frames=motion, mode=mode)
