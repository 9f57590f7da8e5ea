"""FlashVSR (Zhuang et al. 2025): a video of low quality, enlarged, steers its restoration.

Convolutions make one feature map of every four frames, on the grid of the tokens, and linear layers what is added to
the tokens before the first blocks.

Source: OpenImagingLab/FlashVSR (Buffer_LQ4x_Proj). Shapes: B batch, F latent frames, H, W pixels, h, w tokens a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..wanvideo.assign import layer_count
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.modifier import Modifier, Run
from ..wanvideo.modules.model import WanModel
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens
from .decoder import LOW_QUALITY

if TYPE_CHECKING:
    from ..host import Host

TOKEN_SIDE = 16
# Frames of a group that its convolutions read a second time, in front of it.
REPEATED = 2


@dataclass(frozen=True)
class LowQuality(Payload):
    """What WanVideoAddFlashVSRInput emits.

    frames [1, 3, 4 F, H, W] in -1..1: the enlarged video, each latent's last frame and the three behind it; at the end
    the last frame is repeated. strength 0-d: how much of its features is added.
    """

    frames: Tensor
    strength: Tensor
    needs: ClassVar[str] = (
        "FlashVSR input needs a model with LQ_proj_in.conv1.weight: connect the FlashVSR file by "
        "WanVideoExtraModelSelect to 'extra_model' of WanVideoModelLoader, or load a checkpoint that has it merged in."
    )

    def window(self, window: Window) -> Self:
        """The frames of the window's latents. Raises ValueError if there are fewer than the video has."""
        count, needed = self.frames.shape[2], VAE_TIME_STRIDE * (max(window.video) + 1)
        if count < needed:
            raise ValueError(
                f"The FlashVSR images are for {count // VAE_TIME_STRIDE} latent frames but the video has "
                f"{needed // VAE_TIME_STRIDE} or more: give as many images as the video has frames."
            )
        places = [VAE_TIME_STRIDE * place + behind for place in window.video for behind in range(VAE_TIME_STRIDE)]
        return replace(self, frames=self.frames[:, :, places])


class ForDecoding(Modifier):
    """The results of a run with the frames that FlashVSR's decoder reads beside the latents."""

    def around_run(self, run: Run) -> Run:
        """Both results; those of a run without such frames stay as they are."""

        def handing_on(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
            seen, results = request.find(LowQuality), run(request, host)
            return results if seen is None else tuple({**latent, LOW_QUALITY: seen.frames} for latent in results)

        return handing_on


class GroupConv(nn.Conv3d):
    """A convolution that halves the frames of a group, whose last ones it reads once more in front."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, (4, 3, 3), stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, n, h, w] -> [B, C', n / 2, h, w]; edges are repeated."""
        x = torch.cat((x[:, :, -REPEATED:], x), dim=2)
        return super().forward(functional.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class ChannelNorm(nn.Module):
    """RMS norm over the channels of [B, C, n, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Any number of frames."""
        return functional.normalize(x, dim=1) * math.sqrt(x.shape[1]) * self.gamma


class FrameProjection(nn.Module):
    """Frames to what is added to the tokens. hidden: channels behind each convolution; layers: blocks that get it."""

    def __init__(self, hidden: tuple[int, int], dim: int, layers: int) -> None:
        super().__init__()
        first, second = hidden
        self.conv1, self.norm1 = GroupConv(3 * TOKEN_SIDE**2, first), ChannelNorm(first)
        self.conv2, self.norm2 = GroupConv(first, second), ChannelNorm(second)
        self.linear_layers = nn.ModuleList(nn.Linear(second, dim) for _ in range(layers))

    def features(self, frames: Tensor) -> Tensor:
        """frames [1, 3, 4 F, H, W] -> [1, F * h * w, hidden]; every group of four stands alone."""
        maps = []
        for group in frames.split(VAE_TIME_STRIDE, dim=2):
            pixels = group[0].movedim(1, 0).to(self.conv1.weight.dtype)
            x = functional.pixel_unshuffle(pixels, TOKEN_SIDE).movedim(0, 1)[None]
            x = functional.silu(self.norm1(self.conv1(x)))
            maps.append(functional.silu(self.norm2(self.conv2(x))))
        return torch.cat(maps, dim=2).flatten(2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Restoring:
    """What is added before each of the first blocks: features [1, L, hidden] through its layer, times strength."""

    features: Tensor
    strength: Tensor


@dataclass(frozen=True)
class FlashVsr(Extension):
    """hidden: channels behind each convolution; layers: how many blocks get features."""

    hidden: tuple[int, int]
    layers: int
    payload: ClassVar[type] = LowQuality
    file: ClassVar[Kind] = Kind("FlashVSR module", "WanVideo Extra Model Select", (r"^LQ_proj_in\.conv1\.weight$",))
    other_files: ClassVar[tuple[Kind, ...]] = (
        Kind(
            "FlashVSR decoder", "WanVideo FlashVSR Decoder Loader", (r"^decoder\.1\.weight$", r"^decoder\.26\.weight$")
        ),
    )

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the projection of frames."""
        convs = [shapes.get(f"LQ_proj_in.conv{number}.weight") for number in (1, 2)]
        if None in convs:
            return None
        return cls((convs[0][0], convs[1][0]), layer_count(shapes, "LQ_proj_in.linear_layers."))

    def owns(self, key: str) -> bool:
        """The projection of frames."""
        return key.startswith("LQ_proj_in.")

    def build(self, model: WanModel) -> None:
        """Adds LQ_proj_in."""
        model.LQ_proj_in = FrameProjection(self.hidden, model.config.dim, self.layers)

    def modifiers(self) -> tuple[Modifier, ...]:
        """Frames for the decoder go with the latents."""
        return (ForDecoding(),)

    def prepare(
        self, model: WanModel, payload: LowQuality, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Restoring]:
        """Features of the frames; the first block's are added. Raises ValueError for frames of another size."""
        frames, height, width = tokens.grid
        wanted = (VAE_TIME_STRIDE * frames, TOKEN_SIDE * height, TOKEN_SIDE * width)
        if tuple(payload.frames.shape[2:]) != wanted:
            raise ValueError(
                f"The FlashVSR images are {tuple(payload.frames.shape[2:])} but the video is {wanted} (four frames a "
                "latent, height, width): enlarge them to the size of the video and give as many frames."
            )
        state = Restoring(model.LQ_proj_in.features(payload.frames), payload.strength)
        return tokens._replace(x=self._added(model, 0, tokens.x, state)), state

    def on(self, state: Restoring, shard: Shard) -> Restoring:
        """Features are those of the video tokens."""
        return replace(state, features=shard.take(state.features))

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Restoring) -> Tensor:
        """Adds what the next block gets, where it gets something."""
        return self._added(model, index + 1, x, state)

    def _added(self, model: WanModel, index: int, x: Tensor, state: Restoring) -> Tensor:
        if index >= self.layers:
            return x
        added, count = model.LQ_proj_in.linear_layers[index](state.features), state.features.shape[1]
        video = x[:, :count] + added.to(x.dtype) * state.strength.to(x)
        return video if count == x.shape[1] else torch.cat((video, x[:, count:]), dim=1)


EXTENSION = FlashVsr
