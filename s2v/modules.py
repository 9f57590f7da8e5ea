"""What Wan2.2-S2V adds to the Wan transformer: a causal speech encoder, speech attention, and a packer of past frames.

Source: Wan-Video/Wan2.2 (wan/modules/s2v). Module names are the published checkpoint keys.
Shapes: B batch, T video frames, F latent frames, S video tokens a frame, N speech tokens a frame, C channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.config import WanConfig
from ..wanvideo.modules.attention import WanT2VCrossAttention
from ..wanvideo.modules.layers import WanLayerNorm, modulate
from ..wanvideo.rope import rope_table

KERNEL = 3
NORM_EPS = 1e-6
# Of the norm that speech modulates: AdaLayerNorm of diffusers.
MODULATED_EPS = 1e-5


class PackLevel(NamedTuple):
    """A run of past latent frames: how many, the sides of its patches in time and space, its times in the video."""

    frames: int
    patch: tuple[int, int, int]
    times: tuple[int, ...]


# From the nearest to the farthest: the older, the coarser.
PAST = {
    "proj": PackLevel(1, (1, 2, 2), (-1,)),
    "proj_2x": PackLevel(2, (2, 4, 4), (-3,)),
    "proj_4x": PackLevel(16, (4, 8, 8), (-19, -14, -9, -4)),
}
PAST_FRAMES = sum(level.frames for level in PAST.values())


class CausalConv1d(nn.Module):
    """Convolution over time that sees no later frame: the first one repeats in front."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out_channels, KERNEL, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, channels] -> [B, ceil(T / stride), out_channels]."""
        return self.conv(F.pad(x.transpose(1, 2), (KERNEL - 1, 0), mode="replicate")).transpose(1, 2)


class FrameEncoder(nn.Module):
    """Speech of every video frame -> tokens of every latent frame: two of three convolutions halve the frame rate."""

    def __init__(self, audio_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv1_local = CausalConv1d(audio_dim, dim // 4 * tokens)
        self.conv1_global = CausalConv1d(audio_dim, dim // 4)
        self.norm1 = WanLayerNorm(dim // 4, NORM_EPS)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.norm2 = WanLayerNorm(dim // 2, NORM_EPS)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.norm3 = WanLayerNorm(dim, NORM_EPS)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, audio_dim] -> tokens [B, F, N, C], the learned one last, and one vector a frame [B, F, C]."""
        local = self.conv1_local(speech).unflatten(-1, (self.tokens, -1)).transpose(1, 2)
        local = self._halved_twice(local.flatten(0, 1)).unflatten(0, (-1, self.tokens)).transpose(1, 2)
        learned = self.padding_tokens.expand(*local.shape[:2], -1, -1)
        overall = self.final_linear(self._halved_twice(self.conv1_global(speech)))
        return torch.cat((local, learned), dim=2), overall

    def _halved_twice(self, x: Tensor) -> Tensor:
        x = self.conv2(F.silu(self.norm1(x)))
        x = self.conv3(F.silu(self.norm2(x)))
        return F.silu(self.norm3(x))


class CausalAudioEncoder(nn.Module):
    """A learned mean of the speech encoder's layers, then `FrameEncoder`."""

    def __init__(self, layers: int, audio_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.encoder = FrameEncoder(audio_dim, dim, tokens)
        self.weights = nn.Parameter(torch.ones(1, layers, 1, 1))

    def forward(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """[B, layers, audio_dim, T] -> as `FrameEncoder`."""
        weights = F.silu(self.weights)
        mean = (speech.to(weights.dtype) * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1)
        return self.encoder(mean.transpose(1, 2).to(self.encoder.final_linear.weight.dtype))


class SpeechModulation(nn.Module):
    """Shift and scale of a norm from the speech of a frame (the linear layer of an adaptive layer norm)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, overall: Tensor) -> tuple[Tensor, Tensor]:
        """[B * F, C] -> shift and scale [B * F, 1, C] float32."""
        shift, scale = self.linear(F.silu(overall)).float().unsqueeze(1).chunk(2, dim=-1)
        return shift, scale


class SpeechAttention(WanT2VCrossAttention):
    """Cross-attention of the video tokens of each latent frame to the speech tokens of that frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config, sdpa())
        self.norm = WanLayerNorm(config.dim, MODULATED_EPS)

    def forward(self, video: Tensor, shift: Tensor, scale: Tensor, speech: Tensor) -> Tensor:
        """video [B * F, S, C], shift and scale [B * F, 1, C], speech [B * F, N, C] -> [B * F, S, C]."""
        x = modulate(self.norm, video, shift, scale, self.readers())
        k, v = self.keys_values(speech)
        return self.project(self.attention(self.split(self.norm_q(self.q(x))), k, v))


class FramePacker(nn.Module):
    """The 19 latent frames before the video as few tokens: 1, 1/8 and 1/64 of a frame's for each, the older the fewer.

    Source: FramePack (Zhang and Agrawala 2025), as Wan2.2-S2V trains it.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        for name, level in PAST.items():
            setattr(self, name, nn.Conv3d(channels, dim, kernel_size=level.patch, stride=level.patch))

    def forward(self, past: Tensor) -> Tensor:
        """Latents [B, z, F, h, w], the nearest last, with zeros for missing ones -> tokens [B, M, C], nearest first."""
        past = past[:, :, -PAST_FRAMES:].to(self.proj.weight.dtype)
        past = F.pad(past, (0, 0, 0, 0, PAST_FRAMES - past.shape[2], 0))
        tokens, end = [], PAST_FRAMES
        for name, level in PAST.items():
            frames = past[:, :, end - level.frames : end]
            tokens.append(getattr(self, name)(frames).flatten(2).transpose(1, 2))
            end -= level.frames
        return torch.cat(tokens, dim=1)


@functools.lru_cache(maxsize=2)
def past_positions(head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Rotations [M, D/2, 2] of the packer's tokens for a video of height x width tokens.

    A coarser grid is spread over the video's, each token at a whole position of it.
    """
    table = rope_table((PAST_FRAMES, height, width), head_dim, start=(-PAST_FRAMES, 0, 0))
    table = table.unflatten(0, (PAST_FRAMES, height, width))
    parts = []
    for level in PAST.values():
        coarser = level.patch[1] // 2
        rows, columns = (np.linspace(0, n - 1, n // coarser).astype(np.int64) for n in (height, width))
        times = torch.tensor(level.times) + PAST_FRAMES
        parts.append(table[times][:, torch.from_numpy(rows)][:, :, torch.from_numpy(columns)].flatten(0, 2))
    return torch.cat(parts).to(device)
