"""The two convolutional encoders of One-to-All: the encoded reference to a frame of latents, drawn poses to tokens.

Source: ssj9596/One-to-All-Animation (controlnet_modules), the encoder of HunyuanVideo in small. Module names are the
published keys. Shapes: B batch, z latent channels, P pixel frames, F latent frames, C channels of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, GROUPS, EPS = 16, 4, 1e-6
REFERENCE_STAGES = 3
# Time, height, width: 4 frames of 16 by 16 pixels become one token.
POSE_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))


class GroupNorm(nn.GroupNorm):
    """Its weights may be stored in float32 beside activations in another precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same."""
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class CausalConv3d(nn.Module):
    """A convolution of 3 in time, height and width that sees no later frame; edges and the first frame repeat."""

    def __init__(self, channels: int, out: int, stride: int | tuple[int, int, int] = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, P, H, W] -> [B, out, P', H', W']."""
        return self.conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


class Residual(nn.Module):
    """Norm, SiLU and convolution, twice, around a residual."""

    def __init__(self, conv: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(GROUPS, WIDTH, EPS), conv(WIDTH, WIDTH)
        self.norm2, self.conv2 = GroupNorm(GROUPS, WIDTH, EPS), conv(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 16, ...] -> the same."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Stage(nn.Module):
    """A residual block, then a convolution of this stride where there is one."""

    def __init__(self, conv: Callable[..., nn.Module], stride: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(conv)])
        self.downsamplers = nn.ModuleList()
        if stride is not None:
            self.downsamplers.append(nn.ModuleDict({"conv": conv(WIDTH, WIDTH, stride)}))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 16, ...] -> [B, 16, ...], smaller by the stride."""
        for block in self.resnets:
            x = block(x)
        for down in self.downsamplers:
            x = down["conv"](x)
        return x


class Encoder(nn.Module):
    """Convolutions in and out, and stages between them."""

    def __init__(
        self, conv: Callable[..., nn.Module], sizes: tuple[int, int], strides: Sequence[tuple[int, int, int] | None]
    ) -> None:
        super().__init__()
        self.conv_in = conv(sizes[0], WIDTH)
        self.down_blocks = nn.ModuleList(Stage(conv, stride) for stride in strides)
        self.conv_out = conv(WIDTH, sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, ...] -> [B, out, ...], in the precision of the convolutions."""
        x = self.conv_in(x.to(next(self.conv_in.parameters()).dtype))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x)


def reference_encoder(channels: int, latent_channels: int) -> Encoder:
    """Of a reference and its mask, encoded, [B, channels, h, w] -> [B, z, h, w]."""
    return Encoder(_conv2d, (channels, latent_channels), (None,) * REFERENCE_STAGES)


def pose_encoder(channels: int) -> Encoder:
    """Of drawn poses [B, 3, P, H, W] in -1..1 -> tokens [B, channels, F, H / 16, W / 16]."""
    return Encoder(CausalConv3d, (3, channels), POSE_STRIDES)


def _conv2d(channels: int, out: int) -> nn.Module:
    return nn.Conv2d(channels, out, 3, padding=1)
