"""Triton kernel of gated_residual.py: a program a part of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes of bfloat16 a thread.
PART, WARPS = 1024, 4


@triton.jit
def _gated_residual(x, y, gate, out, columns, tokens, parts, x_batch, x_token, y_batch, y_token, gate_batch, gate_token,
                    PART: tl.constexpr):  # fmt: skip
    # Tokens may be more than the second dimension of a grid takes.
    token = (tl.program_id(0) // parts).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) % parts) * PART + tl.arange(0, PART)
    inside = column < columns
    a = tl.load(x + batch * x_batch + token * x_token + column, mask=inside).to(tl.float32)
    b = tl.load(y + batch * y_batch + token * y_token + column, mask=inside).to(tl.float32)
    g = tl.load(gate + batch * gate_batch + token * gate_token + column, mask=inside).to(tl.float32)
    row = (batch * tokens + token) * columns
    tl.store(out + row + column, (a + b * g).to(out.dtype.element_ty), mask=inside)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, out: Tensor) -> None:
    """x + y * gate into `out` [B, L, C], contiguous; x, y as it, gate [C] or [B, 1 or L, C], last dimension dense."""
    batch, tokens, columns = x.shape
    if x.numel() == 0:
        return
    operands = (x, y, gate.expand(x.shape))
    strides = [t.stride(dim) for t in operands for dim in (0, 1)]
    parts = triton.cdiv(columns, PART)
    with torch.cuda.device_of(x):
        _gated_residual[(tokens * parts, batch)](
            *operands, out, columns, tokens, parts, *strides, PART=PART, num_warps=WARPS
        )
