"""Triton kernels of norm_rope_fp8.py.

A program takes some whole rows, a few heads of all of them at a time: once for the sums of squares, and once more, out
of the L2 cache, for the rest. Channels are held as pairs (even, odd), which is what the rotary position turns; their
sums and differences are the first of the Hadamard rotation's steps, and one small matrix product does the others:
H(2n) = H(2) x H(n).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_rope_fp8 import hadamard

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-30)
EXPONENT = tl.constexpr(0x7F800000)
# Rows of a matrix product, heads at a time times rows at a time, and warps: the fastest of 50 forms on an H200.
DOT_ROWS = 32
MOST_HEADS = 8
WARPS = 4
# Without a product one row a program is fastest.
ROW_WARPS = 8
BLOCK = 4096


@triton.jit
def _heads(base, pitch, row, first, PART: tl.constexpr, SIZE: tl.constexpr):
    """Addresses [PART, ROWS, SIZE] of heads `first` and on of the rows `row` [ROWS].

    Heads come before rows, so that a thread holds a channel of several rows.
    """
    head, column = first + tl.arange(0, PART), tl.arange(0, SIZE)
    return base + (row * pitch)[None, :, None] + (head * SIZE)[:, None, None] + column[None, None, :]


@triton.jit
def _load(base, pitch, row, rows, first, PART: tl.constexpr, SIZE: tl.constexpr, KEEP: tl.constexpr):
    """[PART, ROWS, SIZE] float32, and whether the cache should keep it. Behind the last row, that one once more."""
    place = _heads(base, pitch, tl.minimum(row, rows - 1), first, PART, SIZE)
    return tl.load(place, eviction_policy="evict_last" if KEEP else "evict_first").to(tl.float32)


@triton.jit
def _of_channels(base, first, PART: tl.constexpr, SIZE: tl.constexpr):
    """What belongs to channels and not to tokens, [PART, 1, SIZE] float32."""
    head, column = first + tl.arange(0, PART), tl.arange(0, SIZE)
    return tl.load(base + (head * SIZE)[:, None, None] + column[None, None, :]).to(tl.float32)


@triton.jit
def _pairs(x):
    """The even and the odd channels of [PART, ROWS, SIZE]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def _inverse_rms(x, pitch, row, rows, eps, HEADS: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS]"""
    total = tl.zeros([PART, row.shape[0], SIZE], tl.float32)
    for first in range(0, HEADS, PART):
        part = _load(x, pitch, row, rows, first, PART, SIZE, True)
        total += part * part
    return tl.rsqrt(tl.sum(tl.sum(total, axis=2), axis=0) / (HEADS * SIZE) + eps)


@triton.jit
def _turns(rope, row, rows, factor, SIZE: tl.constexpr):
    """Cosine and sine times `factor` [ROWS], each [1, ROWS, SIZE / 2]."""
    table = tl.load(rope + tl.minimum(row, rows - 1)[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
    cos, sin = tl.split(tl.reshape(table, [row.shape[0], SIZE // 2, 2]))
    return (cos * factor[:, None])[None, :, :], (sin * factor[:, None])[None, :, :]


@triton.jit
def _placed(x, pitch, row, rows, first, weight, cos, sin, PART: tl.constexpr, SIZE: tl.constexpr):
    part = _load(x, pitch, row, rows, first, PART, SIZE, False)
    even, odd = _pairs(part * _of_channels(weight, first, PART, SIZE))
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _power_of_two(bound):
    """The largest power of two by which values up to `bound` can be multiplied."""
    ratio = tl.div_rn(LARGEST, tl.maximum(bound, TINY))
    return (ratio.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _signs(matrix, SIZE: tl.constexpr):
    """The Hadamard matrix [SIZE / 2, SIZE / 2]."""
    column = tl.arange(0, SIZE // 2)
    return tl.load(matrix + column[:, None] * (SIZE // 2) + column[None, :])


@triton.jit
def _store_rotated(even, odd, signs, shift, fit, out, row, rows, first,
                   SHIFT: tl.constexpr, HEADS: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    if SHIFT:
        even_shift, odd_shift = _pairs(_of_channels(shift, first, PART, SIZE) * fit)
        even, odd = even - even_shift, odd - odd_shift
    lines: tl.constexpr = PART * row.shape[0]
    sums = tl.dot(tl.reshape((even + odd).to(tl.bfloat16), [lines, SIZE // 2]), signs)
    differences = tl.dot(tl.reshape((even - odd).to(tl.bfloat16), [lines, SIZE // 2]), signs)
    turned = tl.reshape(tl.join(sums, differences), [PART, row.shape[0], SIZE]).to(out.dtype.element_ty)
    tl.store(_heads(out, HEADS * SIZE, row, first, PART, SIZE), turned, mask=(row < rows)[None, :, None])


@triton.jit
def _norm_rope_fp8(x, weight, rope, shift, matrix, largest, out, scale, tokens, x_batch, x_token, rope_batch, eps,
                   reach, SHIFT: tl.constexpr, HEADS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
                   SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x += batch * x_batch
    shift += batch * HEADS * SIZE
    out += batch * tokens * HEADS * SIZE
    fit = _power_of_two(tl.load(largest) * reach)
    if (tl.program_id(0) == 0) & (batch == 0):
        tl.store(scale, tl.div_rn(tl.rsqrt(SIZE * 1.0), fit))
    signs = _signs(matrix, SIZE)
    factor = _inverse_rms(x, x_token, row, tokens, eps, HEADS, PART, SIZE) * fit
    cos, sin = _turns(rope + batch * rope_batch, row, tokens, factor, SIZE)
    for first in range(0, HEADS, PART):
        even, odd = _placed(x, x_token, row, tokens, first, weight, cos, sin, PART, SIZE)
        _store_rotated(even, odd, signs, shift, fit, out, row, tokens, first, SHIFT, HEADS, PART, SIZE)


@triton.jit
def _rotate_fp8(x, largest, shift, matrix, out, scale, tokens, x_batch, x_token, reach, SHIFT: tl.constexpr,
                HEADS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * PART
    fit = _power_of_two(tl.load(largest) * reach)
    if (tl.program_id(0) == 0) & (batch == 0) & (first == 0):
        tl.store(scale, tl.div_rn(tl.rsqrt(SIZE * 1.0), fit))
    even, odd = _pairs(_load(x + batch * x_batch, x_token, row, tokens, first, PART, SIZE, False) * fit)
    _store_rotated(even, odd, _signs(matrix, SIZE), shift + batch * HEADS * SIZE, fit,
                   out + batch * tokens * HEADS * SIZE, row, tokens, first, SHIFT, HEADS, PART, SIZE)  # fmt: skip


@triton.jit
def _norm_rope(x, weight, rope, out, tokens, count, x_batch, x_token, rope_batch, eps, HEADS: tl.constexpr,
               PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # All tokens, or `count` of them, evenly spaced.
    row = line * tokens // count
    x += batch * x_batch
    out += batch * count * HEADS * SIZE
    factor = _inverse_rms(x, x_token, row, tokens, eps, HEADS, PART, SIZE)
    cos, sin = _turns(rope + batch * rope_batch, row, tokens, factor, SIZE)
    for first in range(0, HEADS, PART):
        even, odd = _placed(x, x_token, row, tokens, first, weight, cos, sin, PART, SIZE)
        placed = tl.reshape(tl.join(even, odd), [PART, ROWS, SIZE]).to(out.dtype.element_ty)
        tl.store(_heads(out, HEADS * SIZE, line, first, PART, SIZE), placed, mask=(line < count)[None, :, None])


@triton.jit
def _tensor_fp8(x, largest, out, scale, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fit = _power_of_two(tl.load(largest))
    if tl.program_id(0) == 0:
        tl.store(scale, tl.div_rn(1.0, fit))
    values = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32) * fit
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _expand_fp8(x, scale, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)


def _parts(heads: int) -> dict[str, int]:
    """How many heads at a time, so that they divide all of them, and how many rows a program takes."""
    part = min(heads & -heads, MOST_HEADS)
    return {"PART": part, "ROWS": DOT_ROWS // part}


def _batch_stride(rope: Tensor) -> int:
    return rope.stride(0) if rope.dim() == 4 else 0


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor, out: Tensor, *, eps: float) -> None:
    """x [B, L, C], last dimension dense, -> out [B, N, H, D], contiguous: all tokens, or N of them, evenly spaced."""
    if out.numel() == 0:
        return
    batch, count, heads, size = out.shape
    with torch.cuda.device_of(x):
        _norm_rope[(count, batch)](
            x, weight, rope, out, x.shape[1], count, x.stride(0), x.stride(1), _batch_stride(rope), eps, HEADS=heads,
            PART=_parts(heads)["PART"], ROWS=1, SIZE=size, num_warps=ROW_WARPS,
        )  # fmt: skip


def norm_rope_fp8(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, largest: Tensor, values: Tensor, scale: Tensor,
    *, eps: float,
) -> None:  # fmt: skip
    """x [B, L, C], last dimension dense, weights no larger than largest [1] -> values [B, L, H, D] and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    batch, tokens, heads, size = values.shape
    parts = _parts(heads)
    reach = math.sqrt(x.shape[2] * size) * (1 if shift is None else 2)
    with torch.cuda.device_of(x):
        _norm_rope_fp8[(triton.cdiv(tokens, parts["ROWS"]), batch)](
            x, weight, rope, scale if shift is None else shift, hadamard(size // 2, x.device), largest, values, scale,
            tokens, x.stride(0), x.stride(1), _batch_stride(rope), eps, reach, SHIFT=shift is not None, HEADS=heads,
            SIZE=size, num_warps=WARPS, **parts,
        )  # fmt: skip


def rotate_fp8(x: Tensor, largest: Tensor, shift: Tensor | None, values: Tensor, scale: Tensor) -> None:
    """x [B, L, C], last dimension dense, no larger than largest [1], -> values [B, L, H, D] and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    batch, tokens, heads, size = values.shape
    parts = _parts(heads)
    reach = size * (1.0 if shift is None else 2.0)
    with torch.cuda.device_of(x):
        _rotate_fp8[(triton.cdiv(tokens, parts["ROWS"]), batch, heads // parts["PART"])](
            x, largest, scale if shift is None else shift, hadamard(size // 2, x.device), values, scale, tokens,
            x.stride(0), x.stride(1), reach, SHIFT=shift is not None, HEADS=heads, SIZE=size, num_warps=WARPS, **parts,
        )  # fmt: skip


def tensor_fp8(x: Tensor, largest: Tensor, values: Tensor, scale: Tensor) -> None:
    """x, contiguous and no larger than largest [1], -> values of its shape and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    with torch.cuda.device_of(x):
        _tensor_fp8[(triton.cdiv(x.numel(), BLOCK),)](x, largest, values, scale, x.numel(), BLOCK=BLOCK)


def expand_fp8(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """values * scale [1] -> out of the same shape; all contiguous."""
    if values.numel() == 0:
        return
    with torch.cuda.device_of(values):
        _expand_fp8[(triton.cdiv(values.numel(), BLOCK),)](values, scale, out, values.numel(), BLOCK=BLOCK)
