"""What nodes emit and the sampler reads: plain frozen dataclasses, no behaviour beyond slicing and moving.

Image and video tensors of nodes are [frames, height, width, channels] in 0..1 (ComfyUI's IMAGE). Latents are
[channels, frames, height, width]; a ComfyUI LATENT is a dict whose `samples` is [1, channels, frames, height, width].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .extension import Payload

VAE_TIME_STRIDE = 4


@dataclass(frozen=True, kw_only=True)
class TextEmbeds:
    """Encoded prompts (socket WANVIDEOTEXTEMBEDS).

    positive: one tensor [tokens, text_dim] per prompt, without padding; several are spread over the windows.
    negative: the same for the negative prompt, or empty where none was given.
    """

    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipEmbeds:
    """CLIP vision features (socket WANVIDIMAGE_CLIPEMBEDS): [1, tokens, 1280], 257 tokens an image."""

    positive: Tensor
    negative: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a long talking video is made window by window (node WanVideoImageToVideoMultiTalk).

    start_images: [C, frames, height, width] in -1..1 at the target size, or None for audio only.
    window_frames: frames sampled at once (4n+1); motion_frames: frames that two windows share.
    mode: "auto", "multitalk", "infinitetalk" or "skyreelsv3"; output_path: folder for the frames, "" keeps them in
    memory. vae: the loaded VAE, used for the motion frames and the result. SkyReels V3 alone: drop_frames are cut from
    the end of every window but the last; reference_video, as start_images, gives windows the frame that they end with.
    """

    vae: object
    width: int
    height: int
    window_frames: int
    motion_frames: int
    mode: str = "auto"
    colormatch: str = "disabled"
    start_images: Tensor | None = None
    tiled_vae: bool = False
    offload_between_windows: bool = False
    output_path: str = ""
    drop_frames: int = 0
    reference_video: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImageEmbeds:
    """What the video is conditioned on besides text (socket WANVIDIMAGE_EMBEDS).

    latent_shape: (channels, frames, height, width) of the noise; num_frames: pixel frames of the result.
    cond: [channels, frames, height, width] encoded images, joined to the noise on the channel axis; mask: [4, ...] over
    the same frames, 1 where a frame is given. clip: CLIP features of the images.
    extra_end_frame: the last latent frame is an end image encoded on its own; decoding drops its pixel frame.
    leading_latents: reference latents in front that decoding drops. loop: set for long talking video.
    given_latents: (latent frame, [channels, frames, height, width]) pairs that are known before sampling; a negative
    frame counts from the end. payloads: what other systems add.
    """

    latent_shape: tuple[int, int, int, int]
    num_frames: int
    cond: Tensor | None = None
    mask: Tensor | None = None
    clip: ClipEmbeds | None = None
    extra_end_frame: bool = False
    leading_latents: int = 0
    loop: LoopSettings | None = None
    given_latents: tuple[tuple[int, Tensor], ...] = ()
    payloads: tuple[Payload, ...] = ()


def latent_frames(num_frames: int) -> int:
    """Latent frames of a video: 4n+1 pixel frames give n+1."""
    return (num_frames - 1) // VAE_TIME_STRIDE + 1


def round_frames(num_frames: int) -> int:
    """The largest 4n+1 that is not more than `num_frames`, the counts the Wan VAE can encode."""
    return (latent_frames(num_frames) - 1) * VAE_TIME_STRIDE + 1
