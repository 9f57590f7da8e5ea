"""Triton kernels of channel_rows.py: several rows of channels in registers, each read once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program has in registers.
ELEMENTS = 4096


@triton.jit
def _norm_silu(x, gain, bias, out, rows, columns, scale, eps, BIAS: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = column < columns
    inside = (row < rows) & exists
    value = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), eps)
    weight = tl.load(gain + column, mask=exists, other=0.0).to(tl.float32) * scale
    # One division a row and one a number: exact ones would cost more than the memory does.
    normed = value * (1.0 / length)[:, None] * weight
    tl.store(out + row * columns + column, (normed * tl.sigmoid(normed)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_biased(y, bias, other, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = column < columns
    inside, place = (row < rows) & exists, row * columns + column
    total = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    total += tl.load(other + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def norm_silu(x: Tensor, gain: Tensor, out: Tensor, bias: Tensor | None, *, eps: float) -> None:
    """x, out [..., C] dense; gain, bias [C]."""
    columns = x.shape[-1]
    grid, sizes = _shape(x)
    with_bias = bias is not None
    with torch.cuda.device_of(x):
        _norm_silu[grid](
            x, gain, bias if with_bias else gain, out, x.numel() // columns, columns, math.sqrt(columns), eps,
            BIAS=with_bias, **sizes,
        )  # fmt: skip


def add_biased(y: Tensor, bias: Tensor, other: Tensor) -> None:
    """y, other [..., C] dense, y changed in place; bias [C]."""
    columns = y.shape[-1]
    grid, sizes = _shape(y)
    with torch.cuda.device_of(y):
        _add_biased[grid](y, bias, other, y.numel() // columns, columns, **sizes)


def _shape(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    columns = x.shape[-1]
    width = triton.next_power_of_2(columns)
    rows = max(ELEMENTS // width, 1)
    return (triton.cdiv(x.numel() // columns, rows),), {"ROWS": rows, "COLUMNS": width, "num_warps": 4}
