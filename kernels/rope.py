"""Rotary position embedding of heads in eager PyTorch, in real arithmetic (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, L, H, D] by rope [L or (B, L), D/2, 2], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part.unsqueeze(-2) for part in rope.unbind(-1))
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
