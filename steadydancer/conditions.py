"""What SteadyDancer makes of encoded poses: their motion, their structure, and their alignment with the noise.

Source: MCG-NJU/SteadyDancer (small_archs, mobilenetv2_dcd); dynamic convolution of Li et al. 2021.
Shapes: F latent frames, z latent channels, H, W latent height and width, C hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16
RANK, SQUEEZED, GROUPS = 4, 4, 4
HIDDEN, HEADS = 128, 8


def gate(x: Tensor) -> Tensor:
    """A sigmoid of straight lines, from 0 to 2."""
    return F.relu6(x + 3.0) / 3.0


class FactorConv3d(nn.Module):
    """A convolution in height and width of every channel alone, then one in time."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(CHANNELS, CHANNELS, (1, 3, 3), padding=(0, 1, 1), groups=CHANNELS, bias=False)
        self.temporal = nn.Conv3d(CHANNELS, CHANNELS, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """[1, z, F, H, W] -> [1, z, F, H, W]."""
        return self.temporal(F.silu(self.spatial(x)))


class SelfGate(nn.Module):
    """Features times what their gate lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(SQUEEZED, SQUEEZED, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[F, squeezed] -> [F, squeezed]."""
        return x * gate(self.fc(x))


class DynamicConv(nn.Module):
    """A convolution of one pixel whose weight depends on the frame: scaled channels, and a product of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.conv_q = nn.Conv2d(CHANNELS, RANK, 1, bias=False)
        self.fc = nn.Sequential(nn.Linear(CHANNELS, SQUEEZED, bias=False), SelfGate())
        self.fc_phi = nn.Linear(SQUEEZED, RANK**2, bias=False)
        self.fc_scale = nn.Linear(SQUEEZED, CHANNELS, bias=False)
        self.conv_p = nn.Conv2d(RANK, CHANNELS, 1, bias=False)
        self.bn1 = nn.GroupNorm(GROUPS, RANK)
        self.bn2 = nn.GroupNorm(GROUPS, RANK)

    def forward(self, x: Tensor) -> Tensor:
        """[F, z, H, W] -> [F, z, H, W]."""
        features = self.fc(x.mean(dim=(2, 3)))
        phi = self.fc_phi(features).unflatten(1, (RANK, RANK))
        scaled = gate(self.fc_scale(features))[:, :, None, None] * self.conv(x)
        narrow = self.bn1(self.conv_q(x)).flatten(2)
        narrow = narrow + self.bn2(phi @ narrow)
        return scaled + self.conv_p(narrow.unflatten(2, x.shape[2:]))


class ChannelNorm(nn.Module):
    """Normalizes the channels of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, HIDDEN, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, HIDDEN, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[F, C, H, W] -> [F, C, H, W]."""
        x = x.movedim(1, -1)
        return F.layer_norm(x, (HIDDEN,), self.weight.flatten(), self.bias.flatten()).movedim(-1, 1)


class Alignment(nn.Module):
    """The noise asks the poses: attention among the frames of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_p = nn.Conv2d(CHANNELS, HIDDEN, 1)
        self.proj_r = nn.Conv2d(CHANNELS, HIDDEN, 1)
        self.proj_p_back = nn.Conv2d(HIDDEN, CHANNELS, 1)
        self.cross_attn = nn.MultiheadAttention(HIDDEN, HEADS)
        self.ffn_pose = nn.Sequential(nn.Conv2d(HIDDEN, HIDDEN, 1), nn.SiLU(), nn.Conv2d(HIDDEN, HIDDEN, 1))
        self.norm1 = ChannelNorm()
        self.norm2 = ChannelNorm()

    def forward(self, poses: Tensor, noise: Tensor) -> Tensor:
        """poses, noise [F, z, H, W] -> [F, z, H, W]."""
        # Frames are the sequence and pixels the batch, as the authors' module reads its input.
        keys, queries = (
            proj(x).flatten(2).mT.contiguous() for proj, x in ((self.proj_p, poses), (self.proj_r, noise))
        )
        # With weights it is plain products: a fused kernel's batch of pixels and heads may not fit its launch.
        attended = self.cross_attn(queries, keys, keys, need_weights=True)[0]
        out = self.norm1(attended.mT.unflatten(2, poses.shape[2:]))
        return self.proj_p_back(self.norm2(out + self.ffn_pose(out)))
