"""How a Wan2.2-Animate transformer sees faces: tokens of every latent frame, and the attention that reads them.

Source: Wan-Video/Wan2.2 (wan/modules/animate/face_blocks). Module names are the published checkpoint keys.
Shapes: B batch, T video frames, F latent frames, S video tokens a frame, N face tokens a frame, C channels, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..quantized.linear import shared_input
from ..s2v.modules import CausalConv1d
from ..tensor_layout import dense
from ..wanvideo.config import WanConfig
from ..wanvideo.modules.layers import WanLayerNorm, WanRMSNorm

NORM_EPS = 1e-6


class FaceEncoder(nn.Module):
    """Motion of every video frame -> face tokens of every latent frame."""

    def __init__(self, motion_dim: int, hidden_dim: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv1_local = CausalConv1d(motion_dim, hidden_dim * tokens)
        self.conv2 = CausalConv1d(hidden_dim, hidden_dim, stride=2)
        self.conv3 = CausalConv1d(hidden_dim, hidden_dim, stride=2)
        self.norm = WanLayerNorm(hidden_dim, NORM_EPS)
        self.out_proj = nn.Linear(hidden_dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, motion: Tensor) -> Tensor:
        """[B, T, motion_dim] -> [B, F, N, C], the learned token last."""
        x = self.conv1_local(motion).unflatten(-1, (self.tokens, -1)).transpose(1, 2).flatten(0, 1)
        for conv in (self.conv2, self.conv3):
            x = conv(F.silu(self.norm(x)))
        x = self.out_proj(F.silu(self.norm(x))).unflatten(0, (-1, self.tokens)).transpose(1, 2)
        return torch.cat((x, self.padding_tokens.expand(*x.shape[:2], -1, -1)), dim=2)


class FaceBlock(nn.Module):
    """Attention of the video tokens of each latent frame to the face tokens of that frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, size = config.dim, config.head_dim
        self.heads = (config.num_heads, size)
        self.attention = sdpa()
        self.linear1_kv = nn.Linear(dim, 2 * dim)
        self.linear1_q = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.q_norm = WanRMSNorm(size, NORM_EPS)
        self.k_norm = WanRMSNorm(size, NORM_EPS)
        self.norm = WanLayerNorm(dim, NORM_EPS)

    def forward(self, video: Tensor, faces: Tensor) -> Tensor:
        """video [B * F, S, C], faces [B * F, N, C] -> [B * F, S, C], before the residual."""
        q = self.linear1_q(shared_input(self.norm(video), self.linear1_q)).unflatten(-1, self.heads)
        kv = self.linear1_kv(shared_input(self.norm(faces), self.linear1_kv))
        k, v = (dense(part).unflatten(-1, self.heads) for part in kv.chunk(2, dim=-1))
        out = self.attention(self.q_norm(q), self.k_norm(k), v)
        return self.linear2(out.flatten(2).contiguous())
