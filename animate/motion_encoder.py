"""The motion encoder of Wan2.2-Animate: pictures of a face -> how it moves, apart from who it is.

A convolutional encoder of StyleGAN2's layers (Karras et al. 2020), whose result is placed in a small orthogonal basis,
as in LIA (Wang et al. 2022). Source: Wan-Video/Wan2.2 (wan/modules/animate/motion_encoder). Module names are the
published checkpoint keys. All of it computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
# Keeps the variance of activations: of a leaky ReLU, and of the sum of two branches.
GAIN = math.sqrt(2)
LAST_KERNEL = 4
BLUR = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
# Keeps the basis from losing a direction.
SHIFT = 1e-8
# Faces at 512 pixels take 64 MB each in the first layer.
FACES_AT_ONCE = 8


class EqualConv2d(nn.Module):
    """Convolution whose weights are scaled by their fan-in when it runs."""

    def __init__(self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, kernel, kernel))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, out_channels, H', W']."""
        weight = self.weight.float()
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), stride=self.stride, padding=self.padding)


class FusedLeakyReLU(nn.Module):
    """Bias, leaky ReLU and gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> the same shape."""
        return F.leaky_relu(x + self.bias.float(), SLOPE) * GAIN


class Blur(nn.Module):
    """Smooths every channel before pixels are left out. padding: pixels on each side."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        row = torch.tensor(BLUR)
        self.kernel = nn.Parameter(torch.outer(row, row))
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        kernel = self.kernel.float().flip(0, 1).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, (self.padding,) * 4), kernel, groups=x.shape[1])


class ResBlock(nn.Module):
    """Two convolutions and a skip, at half the size."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(channels, channels, 3, padding=1), FusedLeakyReLU(channels))
        self.conv2 = nn.Sequential(
            Blur(2), EqualConv2d(channels, out_channels, 3, stride=2), FusedLeakyReLU(out_channels)
        )
        self.skip = nn.Sequential(Blur(1), EqualConv2d(channels, out_channels, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, out_channels, H / 2, W / 2]."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / GAIN


class EqualLinear(nn.Linear):
    """Linear layer whose weights are scaled by their fan-in when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return F.linear(x, self.weight.float() / math.sqrt(self.in_features), self.bias.float())


class AppearanceEncoder(nn.Module):
    """Picture -> vector. channels: behind the first layer and behind each block, which halves the sides."""

    def __init__(self, channels: Sequence[int], style_dim: int) -> None:
        super().__init__()
        first = nn.Sequential(EqualConv2d(3, channels[0], 1), FusedLeakyReLU(channels[0]))
        blocks = (ResBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.convs = nn.Sequential(first, *blocks, EqualConv2d(channels[-1], style_dim, LAST_KERNEL))

    def forward(self, faces: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, style_dim]."""
        return self.convs(faces).flatten(1)


class MotionEncoder(nn.Module):
    """Pictures [N, 3, S, S] in -1..1 -> motion [N, style_dim] float32. size: the side S that they must have."""

    def __init__(self, channels: Sequence[int], style_dim: int, motion_dim: int) -> None:
        super().__init__()
        self.size = LAST_KERNEL * 2 ** (len(channels) - 1)
        self.enc = nn.Module()
        self.enc.net_app = AppearanceEncoder(channels, style_dim)
        same = (EqualLinear(style_dim, style_dim) for _ in range(4))
        self.enc.fc = nn.Sequential(*same, EqualLinear(style_dim, motion_dim))
        self.dec = nn.Module()
        self.dec.direction = nn.Module()
        self.dec.direction.weight = nn.Parameter(torch.randn(style_dim, motion_dim))

    def forward(self, faces: Tensor) -> Tensor:
        """A few pictures at a time."""
        parts = faces.float().split(FACES_AT_ONCE)
        motion = torch.cat([self.enc.fc(self.enc.net_app(part)) for part in parts])
        weight = self.dec.direction.weight.float()
        basis = torch.linalg.qr(weight + SHIFT * torch.eye(*weight.shape, device=weight.device))[0]
        return motion @ basis.T
