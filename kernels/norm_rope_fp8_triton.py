"""Triton kernels of norm_rope_fp8.py.

A program takes some whole rows, a few heads of all of them at a time: once for the sums of squares, and once more for
the rest. Channels are held as pairs (even, odd), which is what the rotary position turns; their sums and differences,
the first step of the Hadamard rotation (`hadamard_triton.py`), cost nothing: cos + sin and cos - sin take the place of
cosine and sine.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hadamard_triton import VECTOR, pairs, store_rotated

TINY = tl.constexpr(1e-30)
# Of the kernels that rotate: threads a head (2, 4 or 8) and warps. The fastest form on an H200.
LANES = 8
WARPS = 2
# The most registers a thread of norm_rope_fp8: 16 programs fit a multiprocessor.
REGISTERS = 64
# Values at a time of what is prepared for a whole launch.
PREPARED = 1024
# Of norm and position alone: one row a program is fastest.
MOST_HEADS = 8
ROW_WARPS = 4
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
def _placed(x, pitch, row, rows, first, weight, cos, sin, NORM: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr):
    part = _load(x, pitch, row, rows, first, PART, SIZE, False)
    if NORM:
        part *= _of_channels(weight, first, PART, SIZE)
    even, odd = _pairs(part)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _power_of_two(bound):
    """The largest power of two by which values up to `bound` can be multiplied and stay within 448 = 1.75 * 2 ** 8."""
    bits = tl.maximum(bound, TINY).to(tl.int32, bitcast=True)
    # A mantissa above 1.75 carries into the exponent. 262 is twice its bias, and 8.
    return ((262 - ((bits + 0x1FFFFF) >> 23)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _units(ROWS: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr):
    """A program's row, the first channel in its row and the first channel in its head, of each of its threads."""
    unit = tl.arange(0, ROWS * PART * LANES)
    channel = unit % LANES * VECTOR
    return unit // (LANES * PART), unit // LANES % PART * SIZE + channel, channel


@triton.jit
def _sum_of_row(x, ROWS: tl.constexpr):
    """[U, K] -> [U]: what all threads of a row have together."""
    total = tl.reshape(tl.sum(x, axis=1), [ROWS, x.shape[0] // ROWS])
    return tl.reshape(tl.broadcast_to(tl.sum(total, axis=1)[:, None], total.shape), [x.shape[0]])


@triton.jit
def _finish(even, odd, weight, more, less, shift, target, inside, V: tl.constexpr, LANES: tl.constexpr,
            SHIFT: tl.constexpr):  # fmt: skip
    """Weight, position and shift, with the rotation's first step in the same products; then the rest of it."""
    even_weight, odd_weight = pairs(weight, V, LANES, "")
    even, odd = even * even_weight, odd * odd_weight
    if SHIFT:
        sums, differences = pairs(shift, V, LANES, "")
        sums, differences = even * more + (odd * less + sums), even * less + (differences - odd * more)
    else:
        sums, differences = even * more + odd * less, even * less - odd * more
    store_rotated(sums, differences, target, inside, V, LANES)


@triton.jit
def _norm_rope_fp8(x, weight, rope, shift, fit, out, tokens, room, x_batch, x_token, rope_batch, eps,
                   SHIFT: tl.constexpr, HEADS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
                   LANES: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    V: tl.constexpr = SIZE // (VECTOR * LANES)
    STEP: tl.constexpr = PART * SIZE
    batch = tl.program_id(1).to(tl.int64)
    row, column, channel = _units(ROWS, PART, LANES, SIZE)
    row += tl.program_id(0) * ROWS
    inside = row < tokens
    # Behind the last row, that one once more.
    row = tl.minimum(row, tokens - 1).to(tl.int64)
    x += batch * x_batch + row * x_token + column
    weight += column
    shift += batch * HEADS * SIZE + column
    out += (batch * room + row) * HEADS * SIZE + column
    total = tl.zeros([ROWS * PART * LANES, V * VECTOR // 2], tl.float32)
    for part in tl.static_range(HEADS // PART):
        even, odd = pairs(x + part * STEP, V, LANES, "evict_last")
        total += even * even
        total += odd * odd
    factor = tl.rsqrt(_sum_of_row(total, ROWS) * (1.0 / (HEADS * SIZE)) + eps) * tl.load(fit)
    cos, sin = pairs(rope + batch * rope_batch + row * SIZE + channel, V, LANES, "")
    more, less = (cos + sin) * factor[:, None], (cos - sin) * factor[:, None]
    # The row once more, out of the L1 cache. Kept in registers it would leave room for too few programs.
    for part in tl.static_range(HEADS // PART):
        even, odd = pairs(x + part * STEP, V, LANES, "evict_first")
        _finish(even, odd, weight + part * STEP, more, less, shift + part * STEP, out + part * STEP, inside, V, LANES,
                SHIFT)  # fmt: skip


@triton.jit
def _rotate_fp8(x, shift, fit, out, tokens, room, x_batch, x_token, SHIFT: tl.constexpr, HEADS: tl.constexpr,
                PART: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    V: tl.constexpr = SIZE // (VECTOR * LANES)
    batch = tl.program_id(1).to(tl.int64)
    row, column, _ = _units(ROWS, PART, LANES, SIZE)
    row += tl.program_id(0) * ROWS
    inside = row < tokens
    row = tl.minimum(row, tokens - 1).to(tl.int64)
    x += batch * x_batch + row * x_token + column
    shift += batch * HEADS * SIZE + column
    out += (batch * room + row) * HEADS * SIZE + column
    factor = tl.load(fit)
    for first in range(0, HEADS * SIZE, PART * SIZE):
        even, odd = pairs(x + first, V, LANES, "evict_first")
        sums, differences = (even + odd) * factor, (even - odd) * factor
        if SHIFT:
            even, odd = pairs(shift + first, V, LANES, "")
            sums, differences = sums + even, differences + odd
        store_rotated(sums, differences, out + first, inside, V, LANES)


@triton.jit
def _prepare(bounds, shift, prepared, fit, scale, reach, COUNT: tl.constexpr, CHANNELS: tl.constexpr,
             SHIFT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of values up to `reach` times the largest of `bounds`: what they are multiplied by, and the scale of the result.

    Of a negative shift, multiplied: the rotation's first step, sum and difference in the place of each pair, float16.
    Every row of keys reads it; in float32 that was twice the bytes of the row itself.
    """
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COUNT, BLOCK):
        place = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(bounds + place, mask=place < COUNT, other=0.0).to(tl.float32)))
    factor = _power_of_two(tl.max(largest, axis=0) * reach)
    batch = tl.program_id(0).to(tl.int64)
    if batch == 0:
        tl.store(fit, factor)
        tl.store(scale, tl.div_rn(tl.rsqrt(SIZE * 1.0), factor))
    if SHIFT:
        shift += batch * CHANNELS
        prepared += batch * CHANNELS
        for first in range(0, CHANNELS, 2 * BLOCK):
            place = first + tl.arange(0, BLOCK) * 2
            even = tl.load(shift + place, mask=place < CHANNELS, other=0.0).to(tl.float32) * factor
            odd = tl.load(shift + place + 1, mask=place < CHANNELS, other=0.0).to(tl.float32) * factor
            tl.store(prepared + place, (-even - odd).to(tl.float16), mask=place < CHANNELS)
            tl.store(prepared + place + 1, (odd - even).to(tl.float16), mask=place < CHANNELS)


@triton.jit
def _norm_rope(x, weight, rope, out, tokens, count, x_batch, x_token, rope_batch, eps, NORM: tl.constexpr,
               HEADS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # All tokens, or `count` of them, evenly spaced.
    row = line * tokens // count
    x += batch * x_batch
    out += batch * count * HEADS * SIZE
    factor = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        factor = _inverse_rms(x, x_token, row, tokens, eps, HEADS, PART, SIZE)
    cos, sin = _turns(rope + batch * rope_batch, row, tokens, factor, SIZE)
    for first in range(0, HEADS, PART):
        even, odd = _placed(x, x_token, row, tokens, first, weight, cos, sin, NORM, PART, SIZE)
        placed = tl.reshape(tl.join(even, odd), [PART, ROWS, SIZE]).to(out.dtype.element_ty)
        tl.store(_heads(out, HEADS * SIZE, line, first, PART, SIZE), placed, mask=(line < count)[None, :, None])


@triton.jit
def _tensor_fp8(x, largest, out, scale, count, room, BLOCK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fit = _power_of_two(tl.load(largest))
    if tl.program_id(0) + batch == 0:
        tl.store(scale, tl.div_rn(1.0, fit))
    values = tl.load(x + batch * count + place, mask=place < count, other=0.0).to(tl.float32) * fit
    tl.store(out + batch * room + place, values.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _expand_fp8(x, scale, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)


def _parts(heads: int) -> dict[str, int]:
    """How many heads at a time, so that they divide all of them, and how many rows a program takes."""
    units = 32 * WARPS // LANES
    part = min(heads & -heads, units)
    return {"PART": part, "ROWS": units // part, "LANES": LANES, "num_warps": WARPS}


def _prepared(
    bounds: Tensor, reach: float, shift: Tensor | None, values: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the scale of values no larger than `bounds` times `reach`; what the kernel adds, and multiplies by."""
    batch, _, heads, size = values.shape
    fit = torch.empty_like(scale)
    # Without a shift something that the kernels never read.
    out = fit if shift is None else torch.empty(shift.shape, dtype=torch.float16, device=shift.device)
    _prepare[(1 if shift is None else batch,)](
        bounds, fit if shift is None else shift, out, fit, scale, reach * (1 if shift is None else 2),
        COUNT=bounds.numel(), CHANNELS=heads * size, SHIFT=shift is not None, SIZE=size, BLOCK=PREPARED,
    )  # fmt: skip
    return out, fit


def _batch_stride(rope: Tensor) -> int:
    return rope.stride(0) if rope.dim() == 4 else 0


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor, out: Tensor, *, eps: float) -> None:
    """x [B, L, C], last dimension dense, -> out [B, N, H, D], contiguous: all tokens, or N of them, evenly spaced."""
    _launch_rope(x, weight, rope, out, eps)


def rope_heads(x: Tensor, turns: Tensor, out: Tensor) -> None:
    """x [B, L, C], last dimension dense, turned by `turns` [L or (B, L), D/2, 2] -> out [B, L, H, D], contiguous."""
    _launch_rope(x, None, turns, out, 0.0)


def _launch_rope(x: Tensor, weight: Tensor | None, turns: Tensor, out: Tensor, eps: float) -> None:
    """weight: None where nothing is normalized."""
    if out.numel() == 0:
        return
    batch, count, heads, size = out.shape
    with torch.cuda.device_of(x):
        _norm_rope[(count, batch)](
            x, x if weight is None else weight, turns, out, x.shape[1], count, x.stride(0), x.stride(1),
            _batch_stride(turns), eps, NORM=weight is not None, HEADS=heads, PART=min(heads & -heads, MOST_HEADS),
            ROWS=1, SIZE=size, num_warps=ROW_WARPS,
        )  # fmt: skip


def norm_rope_fp8(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, values: Tensor, scale: Tensor, *, eps: float
) -> None:
    """x [B, L, C], last dimension dense, -> the first L of values [B, room, H, D], and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    (batch, tokens, _), (_, room, heads, size) = x.shape, values.shape
    parts = _parts(heads)
    with torch.cuda.device_of(x):
        added, fit = _prepared(weight, math.sqrt(x.shape[2] * size), shift, values, scale)
        _norm_rope_fp8[(triton.cdiv(tokens, parts["ROWS"]), batch)](
            x, weight, rope, added, fit, values, tokens, room, x.stride(0), x.stride(1), _batch_stride(rope), eps,
            SHIFT=shift is not None, HEADS=heads, SIZE=size, maxnreg=REGISTERS, **parts,
        )  # fmt: skip


def rotate_fp8(x: Tensor, largest: Tensor, shift: Tensor | None, values: Tensor, scale: Tensor) -> None:
    """x [B, L, C], last dimension dense, no larger than largest [1], -> values as of `norm_rope_fp8`, and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    (batch, tokens, _), (_, room, heads, size) = x.shape, values.shape
    parts = _parts(heads)
    with torch.cuda.device_of(x):
        added, fit = _prepared(largest, float(size), shift, values, scale)
        _rotate_fp8[(triton.cdiv(tokens, parts["ROWS"]), batch)](
            x, added, fit, values, tokens, room, x.stride(0), x.stride(1), SHIFT=shift is not None, HEADS=heads,
            SIZE=size, **parts,
        )  # fmt: skip


def tensor_fp8(x: Tensor, largest: Tensor, values: Tensor, scale: Tensor) -> None:
    """x [B, L, H, D], contiguous, up to largest [1], -> the first L of values [B, room, H, D], and scale [1]."""
    if x.numel() == 0:
        scale.fill_(1)
        return
    count, room = x[0].numel(), values[0].numel()
    with torch.cuda.device_of(x):
        _tensor_fp8[(triton.cdiv(count, BLOCK), x.shape[0])](x, largest, values, scale, count, room, BLOCK=BLOCK)


def expand_fp8(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """values * scale [1] -> out of the same shape; all contiguous."""
    if values.numel() == 0:
        return
    with torch.cuda.device_of(values):
        _expand_fp8[(triton.cdiv(values.numel(), BLOCK),)](values, scale, out, values.numel(), BLOCK=BLOCK)
