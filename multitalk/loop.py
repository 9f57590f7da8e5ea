"""Long talking video, window by window: every window goes on from the last frames of the one before.

Source: MeiGen-AI/InfiniteTalk (generate_infinitetalk), MeiGen-AI/MultiTalk and Skywork's SkyReels V3. `run_loop` plans,
checks, keeps and resumes; `window.py` makes one window.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo.denoise import NotFiniteError
from ..wanvideo.fingerprint import digest
from ..wanvideo.frames import latent_frames
from ..wanvideo.loading import WanVideoModel
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.sampling import RunWatcher, check_conditions
from .audio import MultiTalkEmbeds
from .footage import FolderFootage, Footage, MemoryFootage, check_room
from .plan import Window, loop_settings, plan_windows
from .settings import LoopSettings
from .window import WindowMaker

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

# Parts of a step that the progress bar can show, for a bar that moves while a window is decoded.
TICKS = 20


class TalkingLoop(LoopSettings):
    """The settings, as what the sampler runs."""

    def run(self, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        """As `run_loop`."""
        return run_loop(request, host)


def talk_kind(model: WanVideoModel) -> str:
    """How its talking video goes on from window to window; file names tell, as for the original's users."""
    names = [model.path.name, *(module.path.name for module in model.options.modules)]
    return "infinitetalk" if any("infinite" in name.lower() for name in names) else "multitalk"


def run_loop(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
    """Sample a whole talking video: two LATENT dicts with `video` [frames, H, W, 3] in -1..1 and `output_path`.

    The video is as long as the speech. With an output_path, frames are written as they are made, and an equal run that
    was broken off there is continued. Raises ValueError where inputs are missing or do not fit, and where the video
    turns out NaN or black.
    """
    _check_inputs(request)
    loop = loop_settings(request.image.loop, talk_kind(request.model))
    request = replace(request, image=replace(request.image, loop=loop))
    total = request.find(MultiTalkEmbeds).num_frames
    windows = plan_windows(total, loop.window_frames, loop.motion_frames, loop.drop_frames)
    log.info("Sampling %d frames in %d windows of %dx%d.", total, len(windows), loop.width, loop.height)
    sides = (side // loop.vae.spatial_factor for side in (loop.height, loop.width))
    passes = request.guidance.most_passes(len(request.schedule))
    request.model.try_attention((latent_frames(loop.window_frames), *sides), passes)
    footage: Footage = MemoryFootage(total)
    if not loop.output_path:
        check_room(total, loop.height, loop.width)
    else:
        parts = fingerprint_parts(request)
        footage = FolderFootage(Path(loop.output_path), total, {name: digest(part) for name, part in parts.items()})
    footage = request.model.transformer.ranks.writer(footage)
    try:
        latents = _make(windows, request, host, footage)
    finally:
        footage.close()
        loop.vae.managed.release()
        if request.force_offload:
            request.model.managed.release()
    result = {"samples": latents[None], "video": footage.video(), "output_path": loop.output_path}
    return result, dict(result)


def _check_inputs(request: SampleRequest) -> None:
    if request.find(MultiTalkEmbeds) is None:
        raise ValueError("A long talking video needs speech: connect multitalk_embeds to the sampler.")
    check_conditions(request)
    if request.context is not None:
        raise ValueError(
            "context_options and WanVideoImageToVideoMultiTalk are two ways to make a long video: disconnect one."
        )
    if request.image.given_latents:
        raise ValueError("A long talking video takes no extra latents: give its frames as start_image or samples.")
    source = (request.samples or {}).get("samples")
    if request.image.loop.start_images is None and source is None and request.model.config.condition_channels:
        raise ValueError(
            "A long talking video needs a picture: connect start_image to WanVideoImageToVideoMultiTalk, or an encoded "
            "source video to the sampler's samples."
        )


def _make(windows: list[Window], request: SampleRequest, host: Host, footage: Footage) -> Tensor:
    """Make the windows that are missing; returns the latents of the last one."""
    done, handover = footage.open()
    maker = WindowMaker(request, host, windows)
    if handover is not None:
        maker.take_over(handover)
    steps = len(request.schedule)
    with host.progress(len(windows) * (steps + 1) * TICKS, "Sampling") as progress:
        watcher = LoopWatcher(host, progress, request.set_step, done=done * steps, windows=windows, steps=steps)
        for window in windows[done:]:
            watcher.start(window)
            with _broken_off(window, windows, footage, host):
                for images in maker.frames(window, watcher):
                    footage.add(images)
                    watcher.decoded(len(images))
                watcher.finish_window()
                if window is not windows[-1]:
                    footage.finish_window(window.index + 1, maker.hand_over(window))
            log.info("Window %d of %d is finished; %s", window.index + 1, len(windows), watcher.time_left())
    footage.finish()
    return maker.latents


@contextmanager
def _broken_off(window: Window, windows: list[Window], footage: Footage, host: Host) -> Iterator[None]:
    """Keeps the frames of a run that cannot go on, and says which window it was and where they are."""
    try:
        yield
    except (NotFiniteError, torch.OutOfMemoryError) as error:
        place = f"Window {window.index + 1} of {len(windows)} (frames {window.frames.start}-{window.frames.stop - 1})"
        kept = "there are no frames before it"
        if footage.frames:
            stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
            try:
                folder = footage.rescue(host.output_dir() / f"{stamp}_unfinished_talk")
                kept = f"the {footage.frames} frames before are in {folder}"
            except OSError as lost:
                # What went wrong first must not be hidden by what went wrong in saving.
                kept = f"the {footage.frames} frames before could not be saved: {lost}"
        # What is known of an error is in its type: ComfyUI frees its models where memory was short.
        raise type(error)(f"{place}: {error} ({kept[0].upper()}{kept[1:]}.)") from error


class LoopWatcher(RunWatcher):
    """One progress bar over all windows: what is sampled, which window and step, and the time left.

    A step takes TICKS of the bar, and so does decoding a window.
    """

    def __init__(self, *positional: object, windows: list[Window], steps: int, **named: object) -> None:
        super().__init__(*positional, **named)
        self._windows = windows
        self._steps = steps
        self._window = windows[0]
        self._frames = 0
        self._first = self.done
        self._began = time.monotonic()

    def start(self, window: Window) -> None:
        """The window that the next steps belong to."""
        self._window = window
        self._frames = 0
        self._tell("step 0 of {}")

    def begin(self, index: int) -> None:
        """Names the step before it runs."""
        super().begin(index)
        self._tell(f"step {index + 1} of {{}}")

    def end(self, index: int, clean: Tensor) -> None:
        """One step further, with the estimate as preview."""
        self.done += 1
        self.progress.update(self._ticks(), note=self.note, preview=clean)

    def decoded(self, frames: int) -> None:
        """So many frames more of the window have been decoded."""
        self._frames += frames
        self._tell(f"{self._frames} frames decoded")

    def finish_window(self) -> None:
        """All its frames are there."""
        self._frames = len(self._window.frames)
        if self._window is self._windows[-1]:
            taken = datetime.timedelta(seconds=round(time.monotonic() - self._began))
            self.note = f"Finished: {len(self._windows)} windows, {taken}"
        self.progress.update(self._ticks(), note=self.note)

    def _ticks(self) -> int:
        """Of the bar, with what is decoded of the window."""
        finished = (self.done + self._window.index) * TICKS
        return finished + self._frames * TICKS // len(self._window.frames)

    def _tell(self, what: str) -> None:
        frames = self._window.frames
        self.note = (
            f"Sampling audio indices {frames.start}-{frames.stop}, window {self._window.index + 1} of "
            f"{len(self._windows)}, {what.format(self._steps)}, {self.time_left()}"
        )
        self.progress.update(self._ticks(), note=self.note)

    def time_left(self) -> str:
        """From the mean time of the steps so far, decoding included."""
        steps = self.done - self._first
        if not steps:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / steps * (len(self._windows) * self._steps - self.done)
        return f"{datetime.timedelta(seconds=round(seconds))} left"


def fingerprint_parts(request: SampleRequest) -> dict[str, object]:
    """What decides about the frames of a run, by the names that users know."""
    loop, model, speech = request.image.loop, request.model, request.find(MultiTalkEmbeds)
    settings = replace(
        loop, vae=None, output_path="", start_images=None, reference_video=None, offload_between_windows=False
    )
    options = {"window settings": settings, "image_embeds": replace(request.image, loop=None)}
    names = ("cfg", "seed", "samples", "add_noise_to_samples", "batched_cfg", "riflex_index", "text")
    names += ("modifiers", "cache")
    return {
        "model": (model.path, replace(model.options, block_swap=None, keep_on_device=False)),
        "vae": (loop.vae.model, str(loop.vae.dtype)),
        "attention": model.attention.identity(),
        "LoRA": model.loras,
        "start_image": loop.start_images,
        "reference_video": loop.reference_video,
        "multitalk_embeds": speech,
        "other conditions": tuple(
            payload for payload in (*request.payloads, *model.payloads) if payload is not speech
        ),
        "schedule": request.schedule.spec,
        **options,
        **{name: getattr(request, name) for name in names},
    }
