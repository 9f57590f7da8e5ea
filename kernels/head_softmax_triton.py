"""Triton kernel of head_softmax.py: a program some rows, one after the other, whose bias it has in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 8, 1


# Sizes are constants, so that the compiler sees which loads may be wide.
@triton.jit
def _head_softmax(scores, bias, gain, rows, KEYS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
                  KEY_PLACES: tl.constexpr, HEAD_PLACES: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, KEY_PLACES)[:, None]
    head = tl.arange(0, HEAD_PLACES)[None, :]
    exists = (key < KEYS) & (head < HEADS)
    place = key * HEADS + head
    added = tl.load(bias + batch * (KEYS * HEADS) + place, mask=exists, other=0.0).to(tl.float32)
    factor = tl.load(gain)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        inside = exists & (row < rows)
        at = scores + (batch * rows + row) * (KEYS * HEADS) + place
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + added
        total = tl.where(key < KEYS, total, -float("inf"))
        weight = tl.exp(total - tl.max(total, axis=0)[None, :])
        weight = weight * (factor / tl.sum(weight, axis=0))[None, :]
        tl.store(at, weight.to(scores.dtype.element_ty), mask=inside)


def head_softmax(scores: Tensor, bias: Tensor, gain: Tensor, heads: int) -> None:
    """scores [B, L, T * H], changed in place; bias [B, T * H], gain 0-d, float32; all contiguous."""
    batch, rows, columns = scores.shape
    if scores.numel() == 0:
        return
    keys = columns // heads
    with torch.cuda.device_of(scores):
        _head_softmax[(triton.cdiv(rows, ROWS), batch)](
            scores, bias, gain, rows, KEYS=keys, HEADS=heads, ROWS=ROWS, KEY_PLACES=triton.next_power_of_2(keys),
            HEAD_PLACES=triton.next_power_of_2(heads), num_warps=WARPS,
        )  # fmt: skip
