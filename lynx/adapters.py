"""Lynx's adapters: keys and values of a face's identity for cross-attention, of its picture for self-attention.

Source: bytedance/lynx (modules/full and modules/lite, attention_processor). Module names are the published keys.
Shapes: B batch, L tokens, N face tokens, S reference tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantized.linear import shared_input
from ..wanvideo.modules.attention import WanSelfAttention

LITE_EPS = 1e-5


class IpAdapter(nn.Module):
    """Attention of the text cross-attention's queries to face tokens.

    registers: learned tokens behind them (the full form), whose keys take the text keys' norm; without any (the lite
    form) keys have a norm without weights.
    """

    def __init__(self, dim: int, context_dim: int, registers: int, bias: bool) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=bias)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=bias)
        self.registers = nn.Parameter(torch.zeros(1, registers, context_dim)) if registers else None

    def forward(self, cross: WanSelfAttention, q: Tensor, face: Tensor) -> Tensor:
        """q [B, L, H, D] normalized, face [B, N, context] -> heads [B, L, H, D]."""
        if self.registers is not None:
            face = torch.cat((face, self.registers.to(face.dtype).expand(face.shape[0], -1, -1)), dim=1)
        face = shared_input(face.contiguous(), self.to_k_ip, self.to_v_ip)
        k, v = self.to_k_ip(face), self.to_v_ip(face)
        k = _unit(k) if self.registers is None else cross.norm_k(k)
        return cross.attention(q, cross.split(k), cross.split(v))


class RefAdapter(nn.Module):
    """Attention of the self-attention's queries, without positions, to the same block's input of the reference."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_k_ref = nn.Linear(dim, dim)
        self.to_v_ref = nn.Linear(dim, dim)

    def forward(self, attention: WanSelfAttention, q: Tensor, reference: Tensor) -> Tensor:
        """q [B, L, C] projected, reference [B, S, C] modulated -> heads [B, L, H, D]."""
        shared = shared_input(reference.contiguous(), self.to_k_ref, self.to_v_ref)
        k = attention.split(attention.norm_k(self.to_k_ref(shared)))
        q = attention.split(attention.norm_q(q))
        return attention.attention(q, k, attention.split(self.to_v_ref(shared)))


def _unit(k: Tensor) -> Tensor:
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + LITE_EPS)).to(k.dtype)
