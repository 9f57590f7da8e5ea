"""The layers in which LongCat-Video differs from Wan: SwiGLU, norms of each head, modulation that each block makes.

Source: meituan-longcat/LongCat-Video (longcat_video/modules/blocks.py). Module names are those of the published ComfyUI
files. Shapes: B batch, L tokens, C channels, E channels of the time embedding, R rows of modulation.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from ..kernels.fp8_rows import Fp8Rows
from ..quantized.linear import shared_input
from ..wanvideo.config import WanConfig
from ..wanvideo.modules.attention import WanSelfAttention, WanT2VCrossAttention
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import Head, HeadRMSNorm
from ..wanvideo.tokens import BlockInputs


class TimeEmbedding(nn.Module):
    """Sinusoids of the time -> its embedding, narrower than the model."""

    def __init__(self, freq_dim: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width))

    def __getitem__(self, index: int) -> nn.Module:
        return self.mlp[index]

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, freq_dim] -> [B, R, E]."""
        return self.mlp(x)


class SixOfOne(nn.Module):
    """In the place of Wan's projection of the time embedding: each block makes its own modulation of it."""

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, R, E] -> [B, R, 6, E]."""
        return embedding.unsqueeze(2).expand(-1, -1, 6, -1)


class TextEmbedding(nn.Sequential):
    """The embedded prompt, zero where it was padded with zeros."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, text_dim] -> [B, T, C]."""
        return super().forward(x) * (x != 0).any(dim=-1, keepdim=True)


class Modulation(nn.Sequential):
    """What a time embedding shifts, scales and gates by."""

    def __init__(self, width: int, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * dim))
        self.parts = parts

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """[B, R, E] -> as many as there are parts, [B, R, C] float32."""
        return super().forward(embedding.to(self[1].weight.dtype)).float().chunk(self.parts, dim=-1)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    hidden_layers = 2

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(*sizes, bias=False) for sizes in ((dim, hidden_dim), (hidden_dim, dim), (dim, hidden_dim))
        )

    def readers(self) -> tuple[nn.Module, ...]:
        """The linear layers that read its input."""
        return self.w1, self.w3

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., C] -> [..., C]."""
        shared = shared_input(x, self.w1, self.w3)
        # In place: the two are the largest tensors of a forward.
        return self.w2(F.silu(self.w1(shared), inplace=True).mul_(self.w3(shared)))


class LongCatSelfAttention(WanSelfAttention):
    """Attention of all video tokens to each other, with norms of each head."""

    # Kernels that norm queries and keys norm all heads at once. v, q, and k before its norm, behind it, and placed.
    fusible, projections = False, 5

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.norm_q, self.norm_k = (HeadRMSNorm(config.head_dim, config.eps) for _ in range(2))


class LongCatCrossAttention(WanT2VCrossAttention):
    """Attention of video tokens to the text, with norms of each head."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.norm_q, self.norm_k = (HeadRMSNorm(config.head_dim, config.eps) for _ in range(2))


class LongCatBlock(WanAttentionBlock):
    """A Wan block with these layers. It reads the time embedding in the place of modulation."""

    def __init__(self, config: WanConfig, attention: Attention, width: int) -> None:
        super().__init__(config, attention)
        self.self_attn = LongCatSelfAttention(config, attention)
        self.cross_attn = LongCatCrossAttention(config, self.cross_attn.attention)
        self.ffn = SwiGLU(config.dim, config.ffn_dim)
        del self.modulation
        self.modulation = Modulation(width, config.dim, parts=6)

    def modulated(self, inputs: BlockInputs) -> tuple[Tensor, ...]:
        """As the parent's."""
        return self.modulation(inputs.mod[:, :, 0])


class LongCatHead(Head):
    """The head gives the velocity with the other sign: from noise to video."""

    def __init__(self, config: WanConfig, patch_channels: int, width: int) -> None:
        super().__init__(config.dim, patch_channels, config.eps)
        del self.modulation
        self.modulation = Modulation(width, config.dim, parts=2)

    def forward(self, x: Tensor, embedding: Tensor, rows: Tensor | None, parts: int = 1) -> Tensor:
        """As the parent's, embedding [B, R, E]."""
        return -super().forward(x, embedding, rows, parts)

    def modulated(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """As the parent's."""
        return self.modulation(embedding)
