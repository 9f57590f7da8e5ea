"""Two image embeds as one."""

from __future__ import annotations

from dataclasses import replace

from torch.nn.functional import pad

from ..image_to_video.extension import ImageCondition
from ..wanvideo.conditioning import Payload
from ..wanvideo.request import ImageEmbeds
from .conditions import HuMoConditions

SIDES = ("leading_latents", "trailing_latents")


def combined(first: ImageEmbeds, second: ImageEmbeds) -> ImageEmbeds:
    """Both; what the two bring of one kind is the second's.

    Raises ValueError if they are for videos of different sizes, both bring reference latents at one end, or one makes
    the video in a loop and the other is HuMo's.
    """
    sizes = [_video(embeds) for embeds in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The embeds are for different videos (latent channels, frames, height, width): {sizes[0]} and {sizes[1]}; "
            "make both with the same num_frames, width and height."
        )
    kinds = {type(payload) for payload in second.payloads}
    kept = tuple(payload for payload in first.payloads if type(payload) not in kinds)
    for side in SIDES:
        if kept and getattr(first, side) and getattr(second, side):
            raise ValueError("Both embeds bring reference pictures at the same end of the latents: combine only one.")
    leading, trailing = (getattr(second, side) or getattr(first, side) for side in SIDES)
    loop = second.loop or first.loop
    payloads = (*kept, *second.payloads)
    if loop is not None and any(isinstance(payload, HuMoConditions) for payload in payloads):
        raise ValueError(
            "HuMo makes a video in one piece or in context windows, not in a loop: combine it with other embeds, and "
            "connect WanVideoContextOptions for a long video."
        )
    channels, frames, height, width = sizes[1]
    frames += leading + trailing
    return replace(
        second,
        latent_shape=(channels, frames, height, width),
        payloads=tuple(_of_length(payload, frames) for payload in payloads),
        leading_latents=leading,
        trailing_latents=trailing,
        extra_end_frame=first.extra_end_frame or second.extra_end_frame,
        given_latents=second.given_latents or first.given_latents,
        loop=loop,
    )


def _video(embeds: ImageEmbeds) -> tuple[int, int, int, int]:
    """Latent shape without references."""
    channels, frames, *sides = embeds.latent_shape
    return channels, frames - embeds.leading_latents - embeds.trailing_latents, *sides


def _of_length(payload: Payload, frames: int) -> Payload:
    """Encoded pictures for so many latent frames: empty ones follow, in which HuMo puts its references."""
    if not isinstance(payload, ImageCondition):
        return payload
    missing = frames - payload.cond.shape[2]
    return ImageCondition(*(pad(part, (0, 0, 0, 0, 0, missing)) for part in (payload.cond, payload.mask)))
