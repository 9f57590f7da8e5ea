"""Encoded pictures as channels beside the noise: image to video, first-last-frame and Fun inpainting models.

Source: Wan-Video/Wan2.1 (WanI2V), aigc-apps/VideoX-Fun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload, Window, check_size, frames_at
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs

PICTURES = "The latents of the encoded pictures"


@dataclass(frozen=True)
class ImageCondition(Payload):
    """cond [1, C, F, H, W]: encoded pictures and empty frames; mask [1, 4, F, H, W]: 1 where a frame is given."""

    cond: Tensor
    mask: Tensor
    needs: ClassVar[str] = (
        "This is a text-to-video model, but encoded images are connected: load an image-to-video model, or use "
        "WanVideoEmptyEmbeds."
    )
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The frames of the window, of which the first is the video's first, or the window's own picture."""
        first = window.leading
        cond, mask = (frames_at(window.latents, part, PICTURES) for part in (self.cond, self.mask))
        mask[:, :, first] = self.mask[:, :, first]
        picture = self.cond[0, :, first] if window.picture is None else window.picture[:, 0].to(cond)
        cond[:, :, first] = picture
        return replace(self, cond=cond, mask=mask)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True, kw_only=True)
class AddedCondition(Payload):
    """What another node gives to the one that encodes pictures (socket ADD_COND_LATENTS).

    empty [1, C, 1, H, W]: an encoded empty picture at the video's size, which that node fills in.
    """

    empty: Tensor | None = None


@dataclass(frozen=True)
class ImageToVideo(Extension):
    """Present where the patch embedding reads more channels than the head gives."""

    payload: ClassVar[type] = ImageCondition

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """From the widths at both ends of the model."""
        patches, head = shapes.get("patch_embedding.weight"), shapes.get("head.head.weight")
        if patches is None or head is None:
            return None
        reads, predicts = patches[1], head[0] // (patches[2] * patches[3] * patches[4])
        return cls() if reads > predicts else None

    def latents(self, model: WanModel, payload: ImageCondition, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joins mask and pictures behind the noise; Fun models have no room for a mask and read the first frame only.

        Raises ValueError where the channels that are left do not fit, or the pictures are of another size.
        """
        room = model.config.in_dim - latents.shape[1]
        check_size(PICTURES, payload.cond, latents, "encode them at its width, height and length")
        channels = torch.cat((payload.mask, payload.cond), dim=1)
        if room == payload.cond.shape[1]:
            channels = torch.cat((payload.cond[:, :, :1], torch.zeros_like(payload.cond[:, :, 1:])), dim=2)
        if channels.shape[1] != room:
            raise ValueError(
                f"The encoded images give {channels.shape[1]} channels besides the noise, but the model has room for "
                f"{room}: this kind of image input does not belong to this model."
            )
        return torch.cat((latents, channels.to(latents).expand(latents.shape[0], -1, -1, -1, -1)), dim=1)


EXTENSION = ImageToVideo
