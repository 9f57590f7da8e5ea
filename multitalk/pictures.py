"""The pictures that condition the windows of a long video: start pictures, or frames of the source video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.modules.vae import Tile
from .plan import Window
from .settings import LoopSettings

# Latent frames before a frame that the VAE's decoder is shown, so that its causal convolutions have a past.
DECODED_PAST = 2


class Pictures(Protocol):
    """Where a window's picture comes from."""

    def index(self, window: Window) -> int:
        """Which picture: windows with one index share it."""

    def at(self, index: int) -> Tensor:
        """That picture, [3, 1, H, W] in -1..1."""


@dataclass(frozen=True)
class StartPictures:
    """The node's start pictures [3, n, H, W]; InfiniteTalk takes the next one at every window, the last one stays."""

    images: Tensor
    follows: bool

    def index(self, window: Window) -> int:
        """By the window's number."""
        return min(window.index, self.images.shape[1] - 1) if self.follows else 0

    def at(self, index: int) -> Tensor:
        """One of them."""
        return self.images[:, index : index + 1]


@dataclass(frozen=True)
class SourceFrames:
    """Frames of a source video given as latents [z, F, h, w]; InfiniteTalk takes the one that a window starts at."""

    latents: Tensor
    loop: LoopSettings
    follows: bool

    def index(self, window: Window) -> int:
        """The latent frame at the window's start."""
        return min(window.frames.start // VAE_TIME_STRIDE, self.latents.shape[1] - 1) if self.follows else 0

    def at(self, index: int) -> Tensor:
        """Decoded; exact for the first frame, close for later ones, which are decoded without their whole past."""
        part = self.latents[:, max(index - DECODED_PAST, 0) : index + 1]
        video = self.loop.vae.decode(part, tile=Tile() if self.loop.tiled_vae else None, quiet=True)
        return video[:, -1:].clamp(-1, 1)


def keyframe(loop: LoopSettings, window: Window, total: int) -> Tensor | None:
    """SkyReels V3: the frame [3, 1, H, W] of the reference video that a window shall end with.

    A reference shorter than the video is stretched to its length. None without a reference.
    """
    video = loop.reference_video
    if video is None:
        return None
    last = min(window.frames.stop, total) - 1
    length = video.shape[1]
    index = last if length >= total else round(last * (length - 1) / max(total - 1, 1))
    return video[:, index : index + 1]


def grey(like: Tensor, frames: int) -> Tensor:
    """Empty frames [3, frames, H, W]."""
    return torch.zeros(3, frames, *like.shape[2:], dtype=like.dtype)
