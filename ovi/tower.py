"""Ovi's audio tower: a Wan transformer over latents of sound, one token each.

Source: character-ai/Ovi (ovi/modules/model.py, configs/model/dit/audio.json). Names are the published keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attention import sdpa
from ..wanvideo.config import ROPE_THETA, WanConfig
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import Head, sinusoidal_embedding
from ..wanvideo.rope import axis_sizes

# Latents of video in the time of one of sound, so that both have the same position at the same moment.
TIME_SCALE = 0.19676


class TokenConv(nn.Conv1d):
    """A convolution along tokens [B, L, C] that keeps their number."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, in] -> [B, L, out]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GatedConvs(nn.Module):
    """A gated feed-forward of convolutions."""

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.w1, self.w3 = (TokenConv(dim, hidden, kernel, padding=kernel // 2, bias=False) for _ in range(2))
        self.w2 = TokenConv(hidden, dim, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class AudioTower(nn.Module):
    """As wide and deep as the video's transformer. channels: of the latents; hidden, kernel: of the embedding."""

    def __init__(self, config: WanConfig, *, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Sequential(
            TokenConv(channels, dim, kernel, padding=kernel // 2), nn.SiLU(), GatedConvs(dim, hidden, kernel)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(config, sdpa()) for _ in range(config.num_layers))
        self.head = Head(dim, channels, config.eps)

    def embed(self, audio: Tensor) -> Tensor:
        """Latents [L, channels] -> tokens [1, L, C]."""
        return self.patch_embedding(audio[None].to(self.patch_embedding[0].weight.dtype))

    def embed_text(self, text: Sequence[Tensor]) -> Tensor:
        """Prompts [tokens, text_dim] each -> [B, T, C], padded to the model's text length."""
        length = max(self.config.text_len, *(part.shape[0] for part in text))
        padded = torch.stack([functional.pad(part, (0, 0, 0, length - part.shape[0])) for part in text])
        return self.text_embedding(padded.to(self.text_embedding[0].weight.dtype))

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] -> its embedding [B, 1, C] and modulation [B, 1, 6, C], float32."""
        frequencies = sinusoidal_embedding(timestep[:, None], self.config.freq_dim)
        embedding = self.time_embedding(frequencies.to(self.time_embedding[0].weight.dtype))
        return embedding.float(), self.time_projection(embedding).float().unflatten(-1, (6, -1))


def sound_rope(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotations [length, D/2, 2]: in time at the video's pace; channels of height and width do not turn."""
    size = axis_sizes(head_dim)[0]
    frequencies = TIME_SCALE * ROPE_THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    angles = functional.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)
