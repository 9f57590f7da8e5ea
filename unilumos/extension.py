"""UniLumos (Liu et al. 2025): a foreground is lit as the prompt says, or as the background behind it is.

Both videos, encoded, are channels beside the noise, in passes without the prompt, too.
Source: alibaba-damo-academy/Lumos-Custom (UniLumos).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..fun_control.extension import part_of
from ..wanvideo.conditioning import Payload, Window, check_size
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs


@dataclass(frozen=True)
class RelitVideo(Payload):
    """channels [1, 2 C, F, H, W]: latents of the foreground, then of the background; zeros where one is not given."""

    channels: Tensor
    needs: ClassVar[str] = (
        "UniLumos's videos need its model, whose patch_embedding.weight reads 48 channels and which has no "
        "img_emb.proj.0.weight: load it in WanVideoModelLoader, or use other image embeds."
    )
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The frames of the window. Raises ValueError if there are fewer, or for all of it more, than the run has."""
        return replace(self, channels=part_of(window, self.channels, "video of UniLumos"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class UniLumos(Extension):
    """It has no weights of its own."""

    payload: ClassVar[type] = RelitVideo

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """The patch embedding reads two videos beside the noise.

        So do control models, which see a picture through CLIP, too, and MiniMax-Remover, which reads no text.
        """
        patches, head = shapes.get("patch_embedding.weight"), shapes.get("head.head.weight")
        if patches is None or head is None:
            return None
        predicts = head[0] // (patches[2] * patches[3] * patches[4])
        tells = "text_embedding.0.weight" in shapes and "img_emb.proj.0.weight" not in shapes
        return cls() if patches[1] == 3 * predicts and tells else None

    def latents(self, model: WanModel, payload: RelitVideo, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joined behind the noise. Raises ValueError for another size."""
        check_size("UniLumos's latents", payload.channels, latents, "use no reference frames beside them")
        return torch.cat((latents, payload.channels.to(latents).expand(latents.shape[0], -1, -1, -1, -1)), dim=1)


EXTENSION = UniLumos
