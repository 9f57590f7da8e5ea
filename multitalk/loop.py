"""Long talking video, window by window: every window goes on from the last frames of the one before.

Source: MeiGen-AI/InfiniteTalk (generate_infinitetalk), MeiGen-AI/MultiTalk and Skywork's SkyReels V3. `run_loop` plans,
checks and chooses where frames go; `window.py` makes one window.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..wanvideo.fingerprint import digest
from ..wanvideo.footage import FolderFootage, Footage, MemoryFootage, check_room
from ..wanvideo.frames import latent_frames
from ..wanvideo.loading import WanVideoModel
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.sampling import check_conditions
from ..wanvideo.window_loop import check_whole_schedule, make_windows
from .audio import MultiTalkEmbeds
from .drift import warn_of_drift
from .plan import loop_settings, plan_windows
from .settings import LoopSettings
from .window import WindowMaker

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

ON_DISK = "set output_path in WanVideoImageToVideoMultiTalk, and frames go to disk as they are made"


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
    warn_of_drift(request.model, total)
    windows = plan_windows(total, loop.window_frames, loop.motion_frames, loop.drop_frames)
    log.info("Sampling %d frames in %d windows of %dx%d.", total, len(windows), loop.width, loop.height)
    sides = (side // loop.vae.spatial_factor for side in (loop.height, loop.width))
    maker = WindowMaker(request, host, windows)
    maker.check()
    video = make_windows(
        request,
        host,
        maker.frames,
        spans=[window.frames for window in windows],
        size=(latent_frames(loop.window_frames), *sides),
        vae=loop.vae,
        footage=_footage(request, total),
        relay=maker,
    )
    result = {"samples": maker.latents[None], "video": video, "output_path": loop.output_path}
    return result, dict(result)


def _footage(request: SampleRequest, total: int) -> Footage:
    loop = request.image.loop
    if loop.output_path:
        inputs = {name: digest(part) for name, part in fingerprint_parts(request).items()}
        return FolderFootage(Path(loop.output_path), total, inputs)
    check_room(total, loop.height, loop.width, remedy=ON_DISK)
    return MemoryFootage(total)


def _check_inputs(request: SampleRequest) -> None:
    if request.find(MultiTalkEmbeds) is None:
        raise ValueError("A long talking video needs speech: connect multitalk_embeds to the sampler.")
    check_conditions(request)
    check_whole_schedule(request)
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
