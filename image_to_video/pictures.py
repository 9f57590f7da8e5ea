"""Image-to-video conditioning: given pictures and empty frames become condition latents and their mask.

Source: Wan-Video/Wan2.1 (image2video, first_last_frame2video), Wan-Video/Wan2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.images import to_video

if TYPE_CHECKING:
    from ..wanvideo.modules.vae import Tile, WanVAE


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """Pictures of a video to be made. start, end, pad: IMAGE tensors or None; mask [n, h, w]: 1 where a frame is given.

    end_in_video: the end pictures are the video's last frames (FLF2V, Fun); else the end picture is one more latent.
    noise: strength of noise on the pictures. reference [z, n, h, w]: latents in front of the video, or None.
    start_strength, end_strength: factors of the first and last latent of all. spread: how much empty latents are moved
    away from the first one of all.
    """

    width: int
    height: int
    num_frames: int
    start: Tensor | None = None
    end: Tensor | None = None
    pad: Tensor | None = None
    mask: Tensor | None = None
    end_in_video: bool = True
    noise: float = 0.0
    reference: Tensor | None = None
    start_strength: float = 1.0
    end_strength: float = 1.0
    spread: float = 0.0

    @property
    def extra_end(self) -> bool:
        """Whether an end picture is encoded on its own."""
        return self.start is not None and self.end is not None and not self.end_in_video

    @property
    def frames(self) -> int:
        """Pixel frames that are encoded."""
        return self.num_frames + self.extra_end


def encode_given(given: GivenFrames, vae: WanVAE, *, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Condition latents [z, F, h, w] and mask [4, F, h, w], float32 on the CPU."""
    frame_mask = _frame_mask(given, vae.spatial_factor)
    video = _video(given, frame_mask)
    latents = vae.encode_with_end(video, tile=tile) if given.extra_end else vae.encode(video, tile=tile)
    mask = fold_mask(frame_mask, extra_end=given.extra_end)
    if given.reference is not None:
        latents = torch.cat((given.reference, latents), dim=1)
        mask = torch.cat((torch.ones_like(mask[:, :1]).expand(-1, given.reference.shape[1], -1, -1), mask), dim=1)
    latents[:, :1] *= given.start_strength
    latents[:, -1:] *= given.end_strength
    if given.spread > 0:
        empty = (mask[:1].mean(dim=(2, 3), keepdim=True) < 0.5).float()
        latents = latents[:, :1] + (latents - latents[:, :1]) * (1 + given.spread * empty)
    return latents, mask


def fold_mask(frame_mask: Tensor, *, extra_end: bool = False) -> Tensor:
    """Mask of pixel frames [n, h, w] -> [4, F, h, w]: the first frame counts four times, and an extra end frame too."""
    parts = [frame_mask[:1].repeat(VAE_TIME_STRIDE, 1, 1)]
    if extra_end:
        parts += [frame_mask[1:-1], frame_mask[-1:].repeat(VAE_TIME_STRIDE, 1, 1)]
    else:
        parts.append(frame_mask[1:])
    return torch.cat(parts).unflatten(0, (-1, VAE_TIME_STRIDE)).transpose(0, 1).contiguous()


def _frame_mask(given: GivenFrames, factor: int) -> Tensor:
    size = (given.height // factor, given.width // factor)
    mask = torch.zeros(given.frames, *size)
    if given.mask is not None:
        resized = torch.nn.functional.interpolate(given.mask[:, None].float(), size=size, mode="nearest")[:, 0]
        count = min(len(resized), given.frames)
        mask[:count] = resized[:count]
        return mask
    if given.start is not None:
        mask[: given.start.shape[0]] = 1
    if given.end is not None:
        mask[-given.end.shape[0] :] = 1
    return mask


def _video(given: GivenFrames, frame_mask: Tensor) -> Tensor:
    video = torch.zeros(3, given.frames, given.height, given.width)
    if given.pad is not None:
        filler = to_video(given.pad, given.width, given.height)
        index = torch.arange(given.frames).clamp(max=filler.shape[1] - 1)
        empty = frame_mask.mean(dim=(1, 2)) < 0.5
        video[:, empty] = filler[:, index][:, empty]
    placed = 0
    for images, at_end in ((given.start, False), (given.end, True)):
        if images is None:
            continue
        part = noised(to_video(images, given.width, given.height), given.noise)
        placed += part.shape[1]
        if placed > given.frames:
            raise ValueError(f"{placed} pictures are given for a video of {given.frames} frames; give fewer.")
        where = slice(given.frames - part.shape[1], None) if at_end else slice(part.shape[1])
        video[:, where] = part
    return video


def noised(video: Tensor, strength: float) -> Tensor:
    """Noise everywhere but in pure black, which stands for padding."""
    if strength <= 0:
        return video
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0)) * strength
    return video + torch.where(video == -1, torch.zeros_like(video), noise)
