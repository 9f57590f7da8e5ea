"""Triton kernels of norm_rope_fp8.py: a program holds a few whole rows in registers, so that they are read once.

Triton's sizes are powers of two and 40 heads are not, so a row is two parts, as 32 and 8 heads. Channels are held as
pairs (even, odd), which is what the rotary position turns; their sums and differences are the first of the Hadamard
rotation's steps, and one small matrix product does the others: H(2n) = H(2) x H(n).
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
# Fewest rows of a matrix product.
DOT_ROWS = 16
WARPS = 4
# Three programs fit on a multiprocessor of Hopper, without spilling.
REGISTERS = 168
BLOCK = 4096


@triton.jit
def _heads(base, first, heads, PART: tl.constexpr, SIZE: tl.constexpr):
    """Addresses [PART, SIZE] of heads `first` and on of a row, and which of them exist."""
    head = first + tl.arange(0, PART)
    column = tl.arange(0, SIZE)
    return base + head[:, None] * SIZE + column[None, :], (head < heads)[:, None] & (column >= 0)[None, :]


@triton.jit
def _heads_of_rows(base, pitch, row, rows, first, heads, PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The same for all rows, [PART, ROWS, SIZE]. Rows come second, so that a thread holds a channel of all of them."""
    place, inside = _heads(base, first, heads, PART, SIZE)
    row = row + tl.arange(0, ROWS)
    return place[:, None, :] + (row * pitch)[None, :, None], inside[:, None, :] & (row < rows)[None, :, None]


@triton.jit
def _load(base, pitch, row, rows, first, heads, PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """[PART, ROWS, SIZE] float32."""
    place, inside = _heads_of_rows(base, pitch, row, rows, first, heads, PART, ROWS, SIZE)
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_channels(base, first, heads, PART: tl.constexpr, SIZE: tl.constexpr):
    """What belongs to channels and not to tokens, [PART, 1, SIZE] float32."""
    place, inside = _heads(base, first, heads, PART, SIZE)
    return tl.load(place[:, None, :], mask=inside[:, None, :], other=0.0).to(tl.float32)


@triton.jit
def _pairs(x):
    """The even and the odd channels of [PART, ROWS, SIZE]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def _turns(rope, row, rows, factor, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Cosine and sine times `factor` [ROWS], each [1, ROWS, SIZE / 2]."""
    row = row + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    table = tl.load(rope + row[:, None] * SIZE + column[None, :], mask=(row < rows)[:, None], other=0.0)
    cos, sin = tl.split(tl.reshape(table, [ROWS, SIZE // 2, 2]))
    return (cos * factor[:, None])[None, :, :], (sin * factor[:, None])[None, :, :]


@triton.jit
def _squares(x):
    """Sums over heads and channels, [ROWS]."""
    return tl.sum(tl.sum(x * x, axis=2), axis=0)


@triton.jit
def _placed(x, gain, cos, sin):
    even, odd = _pairs(x * gain)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _power_of_two(bound):
    """The largest power of two by which values up to `bound` can be multiplied."""
    ratio = tl.div_rn(LARGEST, tl.maximum(bound, TINY))
    return (ratio.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _store_rotated(even, odd, matrix, shift, fit, out, row, rows, first, heads,
                   SHIFT: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    if SHIFT:
        even_shift, odd_shift = _pairs(_of_channels(shift, first, heads, PART, SIZE) * fit)
        even, odd = even - even_shift, odd - odd_shift
    sums = tl.dot(tl.reshape((even + odd).to(tl.bfloat16), [PART * ROWS, SIZE // 2]), matrix)
    differences = tl.dot(tl.reshape((even - odd).to(tl.bfloat16), [PART * ROWS, SIZE // 2]), matrix)
    turned = tl.reshape(tl.join(sums, differences), [PART, ROWS, SIZE])
    place, inside = _heads_of_rows(out, heads * SIZE, row, rows, first, heads, PART, ROWS, SIZE)
    tl.store(place, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope_fp8(x, weight, rope, shift, matrix, out, scale, tokens, heads, x_batch, x_token, rope_batch, eps, reach,
                   SHIFT: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr,
                   SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS
    x += batch * x_batch
    part = _load(x, x_token, row, tokens, 0, heads, PART, ROWS, SIZE)
    gain = _of_channels(weight, 0, heads, PART, SIZE)
    total, largest = _squares(part), tl.max(tl.abs(gain))
    # Names that REST = 0 leaves unused.
    rest, rest_gain = part, gain
    if REST > 0:
        rest = _load(x, x_token, row, tokens, PART, heads, REST, ROWS, SIZE)
        rest_gain = _of_channels(weight, PART, heads, REST, SIZE)
        total, largest = total + _squares(rest), tl.maximum(largest, tl.max(tl.abs(rest_gain)))
    fit = _power_of_two(largest * reach)
    if (tl.program_id(0) == 0) & (batch == 0):
        tl.store(scale, tl.div_rn(tl.rsqrt(SIZE * 1.0), fit))
    column = tl.arange(0, SIZE // 2)
    signs = tl.load(matrix + column[:, None] * (SIZE // 2) + column[None, :])
    factor = tl.rsqrt(total / (heads * SIZE) + eps) * fit
    cos, sin = _turns(rope + batch * rope_batch, row, tokens, factor, ROWS, SIZE)
    shift += batch * heads * SIZE
    out += batch * tokens * heads * SIZE
    even, odd = _placed(part, gain, cos, sin)
    _store_rotated(even, odd, signs, shift, fit, out, row, tokens, 0, heads, SHIFT, PART, ROWS, SIZE)
    if REST > 0:
        even, odd = _placed(rest, rest_gain, cos, sin)
        _store_rotated(even, odd, signs, shift, fit, out, row, tokens, PART, heads, SHIFT, REST, ROWS, SIZE)


@triton.jit
def _rotate_fp8(x, largest, shift, matrix, out, scale, tokens, heads, x_batch, x_token, reach,
                SHIFT: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(2) * PART
    fit = _power_of_two(tl.load(largest) * reach)
    if (tl.program_id(0) == 0) & (batch == 0) & (first == 0):
        tl.store(scale, tl.div_rn(tl.rsqrt(SIZE * 1.0), fit))
    even, odd = _pairs(_load(x + batch * x_batch, x_token, row, tokens, first, heads, PART, ROWS, SIZE) * fit)
    column = tl.arange(0, SIZE // 2)
    signs = tl.load(matrix + column[:, None] * (SIZE // 2) + column[None, :])
    _store_rotated(even, odd, signs, shift + batch * heads * SIZE, fit, out + batch * tokens * heads * SIZE, row,
                   tokens, first, heads, SHIFT, PART, ROWS, SIZE)  # fmt: skip


@triton.jit
def _store_placed(even, odd, out, first, heads, PART: tl.constexpr, SIZE: tl.constexpr):
    place, inside = _heads(out, first, heads, PART, SIZE)
    tl.store(place, tl.reshape(tl.join(even, odd), [PART, SIZE]), mask=inside)


@triton.jit
def _place_sample(x, weight, rope, out, tokens, count, heads, x_batch, x_token, rope_batch, eps,
                  PART: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tokens // count
    x += batch * x_batch
    part = _load(x, x_token, row, tokens, 0, heads, PART, 1, SIZE)
    total = _squares(part)
    rest = part
    if REST > 0:
        rest = _load(x, x_token, row, tokens, PART, heads, REST, 1, SIZE)
        total += _squares(rest)
    factor = tl.rsqrt(total / (heads * SIZE) + eps)
    cos, sin = _turns(rope + batch * rope_batch, row, tokens, factor, 1, SIZE)
    out += (batch * count + tl.program_id(0)) * heads * SIZE
    even, odd = _placed(part, _of_channels(weight, 0, heads, PART, SIZE), cos, sin)
    _store_placed(even, odd, out, 0, heads, PART, SIZE)
    if REST > 0:
        even, odd = _placed(rest, _of_channels(weight, PART, heads, REST, SIZE), cos, sin)
        _store_placed(even, odd, out, PART, heads, REST, SIZE)


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
    """Heads as two powers of two, the second the smaller one, and how many rows a program takes."""
    part = 1 << (heads.bit_length() - 1)
    rest = heads - part
    rest = max(triton.next_power_of_2(rest), part // 4) if rest else 0
    return {"PART": part, "REST": rest, "ROWS": max(2, DOT_ROWS // (rest or part))}


def _batch_stride(rope: Tensor) -> int:
    return rope.stride(0) if rope.dim() == 4 else 0


def mean(x: Tensor, weight: Tensor, rope: Tensor, *, eps: float, heads: int, count: int) -> Tensor:
    """x [B, L, C], last dimension dense, -> [B, C] float32: the mean of `count` tokens."""
    batch, tokens, columns = x.shape
    parts = _parts(heads)
    placed = torch.empty((batch, count, columns), dtype=torch.float32, device=x.device)
    if placed.numel() == 0:
        return placed.new_zeros((batch, columns))
    with torch.cuda.device_of(x):
        _place_sample[(count, batch)](
            x, weight, rope, placed, tokens, count, heads, x.stride(0), x.stride(1), _batch_stride(rope), eps,
            PART=parts["PART"], REST=parts["REST"], SIZE=columns // heads, num_warps=WARPS,
        )  # fmt: skip
    return placed.mean(1)


def norm_rope_fp8(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, values: Tensor, scale: Tensor, *, eps: float
) -> None:
    """x [B, L, C], last dimension dense, -> values [B, L, H, D] and scale [1], both contiguous."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    batch, tokens, heads, size = values.shape
    parts = _parts(heads)
    reach = math.sqrt(x.shape[2] * size) * (1 if shift is None else 2)
    with torch.cuda.device_of(x):
        _norm_rope_fp8[(triton.cdiv(tokens, parts["ROWS"]), batch)](
            x, weight, rope, scale if shift is None else shift, hadamard(size // 2, x.device), values, scale, tokens,
            heads, x.stride(0), x.stride(1), _batch_stride(rope), eps, reach, SHIFT=shift is not None, SIZE=size,
            num_warps=WARPS, maxnreg=REGISTERS, **parts,
        )  # fmt: skip


def rotate_fp8(x: Tensor, largest: Tensor, shift: Tensor | None, values: Tensor, scale: Tensor) -> None:
    """x [B, L, C], last dimension dense, no larger than largest [1], -> values [B, L, H, D] and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    batch, tokens, heads, size = values.shape
    part = min(triton.next_power_of_2(heads), 8)
    rows = 64 // part
    reach = size * (1.0 if shift is None else 2.0)
    with torch.cuda.device_of(x):
        _rotate_fp8[(triton.cdiv(tokens, rows), batch, triton.cdiv(heads, part))](
            x, largest, scale if shift is None else shift, hadamard(size // 2, x.device), values, scale, tokens, heads,
            x.stride(0), x.stride(1), reach, SHIFT=shift is not None, ROWS=rows, PART=part, SIZE=size, num_warps=WARPS,
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
