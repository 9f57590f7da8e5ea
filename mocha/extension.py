"""MoCha (Orange Team 2025): who a mask marks in the first frame of a video becomes who is in one or two pictures.

The video, the mask and the pictures, encoded, are frames behind the noise, which all blocks attend to. The video stands
where the noise stands, the mask at its first frame, and the pictures a frame before it, the second diagonally beside
the first. Source: Orange-3DV-Team/MoCha (wan_video_mocha).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.conditioning import Payload, Window, frames_at
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens

# Where the pictures are in time; the video begins at 0.
PICTURE_TIME = -1


@dataclass(frozen=True)
class SubjectReplacement(Payload):
    """source [1, C, F, H, W]: the encoded video; mask [1, C, 1, H, W]: 1 where the subject is in its first frame, else
    -1; pictures [1, C, n, H, W]: n encoded pictures of who takes the place."""

    source: Tensor
    mask: Tensor
    pictures: Tensor
    needs: ClassVar[str] = "MoCha's frames can be read by every Wan model; this one was built without extensions."
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self | None:
        """The source's frames; the mask and the pictures are there in every window."""
        if not window.video:
            return None
        return replace(self, source=frames_at(window.video, self.source, "The latents of MoCha's input_video"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class MoCha(Extension):
    """It has no weights: the model itself was trained to see these frames."""

    payload: ClassVar[type] = SubjectReplacement

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Nothing in a file tells it from the text-to-video model that it was trained from."""
        return cls()

    def prepare(
        self, model: WanModel, payload: SubjectReplacement, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Appends all frames; condition channels, if there are any, are empty. Raises ValueError for another size."""
        config, (_, channels, *source) = model.config, payload.source.shape
        if channels != config.out_dim or source != list(tokens.latents.shape[2:]):
            raise ValueError(
                f"MoCha's video has latents {(channels, *source)} but the new one "
                f"{(config.out_dim, *tokens.latents.shape[2:])}: encode it with the model's VAE at the same width, "
                "height and length, and use no reference frames beside it."
            )
        latents = torch.cat((payload.source, payload.mask, payload.pictures), dim=2)
        latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, config.in_dim - channels))
        patches = model.patch_embedding(latents.to(model.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        rope = self._rope(model, payload.pictures.shape[2], inputs, tokens)
        # Where frames differ in time, as with given first frames, these are as noisy as the last one.
        return tokens.appended(patches.expand(tokens.x.shape[0], -1, -1), rope, tokens.last_frame_mod), None

    def _rope(self, model: WanModel, count: int, inputs: ModelInputs, tokens: Tokens) -> Tensor:
        """Rotations of the video, the mask and `count` pictures."""
        frames, height, width = tokens.grid
        video = model.rope(tokens.grid, riflex_index=inputs.riflex_index, device=tokens.x.device)
        diagonal = model.rope(
            (1, count * height, count * width),
            start=(PICTURE_TIME, 0, 0),
            riflex_index=inputs.riflex_index,
            riflex_frames=frames,
            device=tokens.x.device,
        ).unflatten(0, (count, height, count, width))
        pictures = [diagonal[number, :, number].flatten(0, 1) for number in range(count)]
        return torch.cat((video, video[: height * width], *pictures))


EXTENSION = MoCha
