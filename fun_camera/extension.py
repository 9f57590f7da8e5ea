"""Camera models of VideoX-Fun (1.1, 2.2): the path of the camera, embedded by an adapter, added to the video's tokens.

Source: aigc-apps/VideoX-Fun (wan_camera_adapter, wan_transformer3d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..fun_control.extension import part_of, with_empty_picture
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

ADAPTER = "control_adapter."
# Six Pluecker coordinates of the four frames behind a latent one.
RAY_CHANNELS = 24


@dataclass(frozen=True)
class CameraPath(Payload):
    """rays [1, 24, F, height, width] in pixels: Pluecker coordinates of the four frames behind each latent frame.

    start, end: the part of the steps (0..1) in which the camera moves by them.
    """

    rays: Tensor
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "A camera path needs a model with control_adapter.conv.weight: load a Fun Control Camera model (1.1 or 2.2)."
    )
    fills_channels: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The frames of the window."""
        return replace(self, rays=part_of(window, self.rays, "camera path"))


class ResidualBlock(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return x + self.conv2(self.conv1(x).relu())


class CameraAdapter(nn.Module):
    """Pixels to tokens: each latent's pixels become channels, then patches, then residual blocks."""

    def __init__(self, dim: int, factor: int, patch: tuple[int, int], blocks: int) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(factor)
        self.conv = nn.Conv2d(RAY_CHANNELS * factor**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(ResidualBlock(dim) for _ in range(blocks)))

    def forward(self, rays: Tensor) -> Tensor:
        """[B, 24, F, height, width] -> [B, C, F, h, w], frame by frame."""
        frames = rays.transpose(1, 2).flatten(0, 1).to(self.conv.weight.dtype)
        out = self.residual_blocks(self.conv(self.unshuffle(frames)))
        return out.unflatten(0, (rays.shape[0], -1)).transpose(1, 2)


@dataclass(frozen=True)
class FunCamera(Extension):
    """factor: pixels of a latent's side (8, and 16 for the 5B); blocks: residual blocks of the adapter."""

    factor: int
    blocks: int
    payload: ClassVar[type] = CameraPath

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the adapter."""
        first = shapes.get(f"{ADAPTER}conv.weight")
        if first is None:
            return None
        blocks = [key for key in shapes if key.startswith(ADAPTER) and key.endswith(".conv1.weight")]
        return cls(factor=math.isqrt(first[1] // RAY_CHANNELS), blocks=len(blocks))

    def owns(self, key: str) -> bool:
        """The adapter."""
        return key.startswith(ADAPTER)

    def build(self, model: WanModel) -> None:
        """Adds control_adapter."""
        config = model.config
        model.control_adapter = CameraAdapter(config.dim, self.factor, config.patch_size[1:], self.blocks)

    def latents(self, model: WanModel, payload: CameraPath, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Where no picture is connected, its channels are empty."""
        return with_empty_picture(model, payload, latents, inputs)

    def prepare(
        self, model: WanModel, payload: CameraPath, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Adds the embedded path to the video's tokens, in its steps."""
        if not inputs.step.within(payload.start, payload.end):
            return tokens, None
        side = self.factor * model.config.patch_size[1]
        size = (payload.rays.shape[2], payload.rays.shape[3] // side, payload.rays.shape[4] // side)
        if size != tokens.grid:
            raise ValueError(
                f"The camera path gives {size} patches (frames, height, width) but the video has {tokens.grid}: give "
                "both the same number of frames, width and height."
            )
        path = model.control_adapter(payload.rays).flatten(2).transpose(1, 2).to(tokens.x.dtype)
        count = video_tokens(tokens.grid)
        return tokens._replace(x=torch.cat((tokens.x[:, :count] + path, tokens.x[:, count:]), dim=1)), None


EXTENSION = FunCamera
