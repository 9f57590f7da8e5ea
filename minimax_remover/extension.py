"""MiniMax-Remover: what a mask covers goes out of a video. Video and mask, encoded, are channels beside the noise.

Source: zibojia/MiniMax-Remover; MiniMax-Remover (Zi et al. 2025). The model reads no text.
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


@dataclass(frozen=True)
class MaskedVideo(Payload):
    """channels [1, 2 C, F, H, W]: latents of the masked video, then of the mask as a video."""

    channels: Tensor
    needs: ClassVar[str] = (
        "MiniMax-Remover's video and mask need its model, which reads 48 channels and no text: load it in "
        "WanVideoModelLoader, or use other image embeds."
    )
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The frames of the window."""
        return replace(self, channels=frames_at(window.latents, self.channels, "The latents of MiniMax-Remover"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class MiniMaxRemover(Extension):
    """It has no weights of its own."""

    payload: ClassVar[type] = MaskedVideo

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """A transformer without layers for text."""
        return cls() if "patch_embedding.weight" in shapes and "text_embedding.0.weight" not in shapes else None

    def latents(self, model: WanModel, payload: MaskedVideo, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joined behind the noise. Raises ValueError for another length or size."""
        advice = "encode video and mask at the size and length of the embeds"
        check_size("MiniMax-Remover's latents", payload.channels, latents, advice)
        return torch.cat((latents, payload.channels.to(latents).expand(latents.shape[0], -1, -1, -1, -1)), dim=1)


EXTENSION = MiniMaxRemover
