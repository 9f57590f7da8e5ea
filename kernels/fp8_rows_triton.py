"""Triton kernels of fp8_rows.py: a whole row in registers, so that it is read once.

A row is a tuple of pieces whose size is a power of two: one block would be padded, 5,120 columns to 8,192. Only the
pieces behind the first FULL reach over the row's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)
# Columns of a warp in a piece, 16 bytes of bfloat16 a thread, and the most pieces before a row gets more warps.
WARP_COLUMNS = 256
MOST_PIECES = 7
# The same of the kernel with a norm, where the modulation is in registers too.
NORM_WARP_COLUMNS = 256
NORM_MOST_PIECES = 5
MOST_WARPS = 32
# Columns of a program that expands: 16 bytes of FP8 a thread.
EXPANDED = 2048
# Enough tokens to keep a GPU busy while every program takes several of them.
MANY_TOKENS, SHARED_ROWS = 8192, 8


# Pieces are 0 behind the last column: loads put it there, and every step before `_store_row` keeps it.
@triton.jit
def _load_row(row, exists, columns, PIECE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr):
    pieces = ()
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        if i < FULL:
            pieces += (tl.load(row + column, mask=exists, other=0.0),)
        else:
            pieces += (tl.load(row + column, mask=exists & (column < columns), other=0.0),)
    return pieces


@triton.jit
def _store_pieces(pieces, row, columns, PIECE: tl.constexpr, FULL: tl.constexpr):
    for i in tl.static_range(len(pieces)):
        column = i * PIECE + tl.arange(0, PIECE)
        if i < FULL:
            tl.store(row + column, pieces[i].to(row.dtype.element_ty))
        else:
            tl.store(row + column, pieces[i].to(row.dtype.element_ty), mask=column < columns)


@triton.jit
def _sum(pieces):
    total = pieces[0].to(tl.float32)
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i].to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _store_row(y, values, scales, row, columns_out, STATIC: tl.constexpr, static, PIECE: tl.constexpr,
               FULL: tl.constexpr):  # fmt: skip
    q = ()
    if STATIC:
        scale = tl.load(static).to(tl.float32)
        for i in tl.static_range(len(y)):
            # A NaN stays one, as in PyTorch; without the option it becomes a limit, and nobody would notice.
            z = y[i] * tl.div_rn(1.0, scale)
            q += (tl.clamp(z, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL),)
    else:
        largest = tl.abs(y[0])
        for i in tl.static_range(1, len(y)):
            largest = tl.maximum(largest, tl.abs(y[i]))
        largest = tl.maximum(tl.max(largest, axis=0), TINY)
        scale = largest * (1.0 / LARGEST)
        # In the order of PyTorch, which divides a number by a tensor as reciprocal times number: else ties differ.
        factor = tl.div_rn(1.0, largest) * LARGEST
        for i in tl.static_range(len(y)):
            q += (y[i] * factor,)
    tl.store(scales + row, scale)
    _store_pieces(q, values + row * columns_out, columns_out, PIECE, FULL)


@triton.jit
def _quantize(x, static, values, scales, pitch, columns, columns_out, GELU: tl.constexpr, STATIC: tl.constexpr,
              PIECE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pieces = _load_row(x + row * pitch, True, columns, PIECE, PIECES, FULL)
    wide = ()
    for i in tl.static_range(PIECES):
        y = pieces[i].to(tl.float32)
        if GELU:
            # y * sigmoid(2 * sqrt(2 / pi) * (y + 0.044715 * y ** 3)), with the exponential's factor in the numbers.
            y = y / (1 + tl.exp2(y * (-2.302208198 - 0.1029432397 * y * y)))
        wide += (y,)
    _store_row(wide, values, scales, row, columns_out, STATIC, static, PIECE, FULL)


@triton.jit
def _normed(pieces, gains, shifts, columns, eps, RMS: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr):
    centred, squares = (), ()
    if RMS:
        for i in tl.static_range(len(pieces)):
            y = pieces[i].to(tl.float32)
            centred, squares = centred + (y,), squares + (y * y,)
    else:
        mean = _sum(pieces) / columns
        for i in tl.static_range(len(pieces)):
            y = pieces[i].to(tl.float32) - mean
            if i >= FULL:
                y = tl.where(i * PIECE + tl.arange(0, PIECE) < columns, y, 0.0)
            centred, squares = centred + (y,), squares + (y * y,)
    factor = tl.rsqrt(_sum(squares) / columns + eps)
    normed = ()
    for i in tl.static_range(len(pieces)):
        y = centred[i] * factor * gains[i].to(tl.float32)
        if not RMS:
            y += shifts[i]
        normed += (y,)
    return normed


@triton.jit
def _norm(x, gain, shift, out, scales, columns, columns_out, tokens, x_batch, x_token, gain_batch, gain_token,
          shift_batch, shift_token, eps, QUANTIZE: tl.constexpr, RMS: tl.constexpr, SHARED: tl.constexpr,
          ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    x += batch * x_batch
    gain += batch * gain_batch
    shift += batch * shift_batch
    if SHARED:
        g = _load_row(gain, True, columns, PIECE, PIECES, FULL)
        # An RMS norm has no shift, and this name is then never read.
        s = g
        if not RMS:
            s = _load_row(shift, True, columns, PIECE, PIECES, FULL)
    ahead = _load_row(x + token * x_token, True, columns, PIECE, PIECES, FULL)
    for _ in range(ROWS):
        pieces = ahead
        following = token + tl.num_programs(0)
        ahead = _load_row(x + following * x_token, following < tokens, columns, PIECE, PIECES, FULL)
        if not SHARED:
            g = _load_row(gain + token * gain_token, token < tokens, columns, PIECE, PIECES, FULL)
            s = _load_row(shift + token * shift_token, token < tokens, columns, PIECE, PIECES, FULL)
        y = _normed(pieces, g, s, columns, eps, RMS, PIECE, FULL)
        if token < tokens:
            row = batch * tokens + token
            if QUANTIZE:
                _store_row(y, out, scales, row, columns_out, False, scales, PIECE, FULL)
            else:
                _store_pieces(y, out + row * columns_out, columns, PIECE, FULL)
        token = following


@triton.jit
def _expand_rows(values, scale, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(values + row * columns + column, mask=column < columns).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * columns + column, wide.to(out.dtype.element_ty), mask=column < columns)


def expand_rows(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """FP8 values [N, P] times scale [N, 1] -> out [N, P] of any floating-point type; all contiguous."""
    rows, columns = values.shape
    if values.numel() == 0:
        return
    with torch.cuda.device_of(values):
        _expand_rows[(rows, triton.cdiv(columns, EXPANDED))](values, scale, out, columns, BLOCK=EXPANDED)


def row_options(columns: int, columns_out: int, warp_columns: int, most_pieces: int) -> dict[str, int]:
    """How a row of so many columns, and of so many with padding, is cut into pieces, and over how many warps."""
    warps = 1
    while warps < MOST_WARPS and columns_out > warps * warp_columns * most_pieces:
        warps *= 2
    piece = warps * warp_columns
    return {
        "PIECE": piece, "PIECES": triton.cdiv(columns_out, piece), "FULL": columns // piece, "num_warps": warps
    }  # fmt: skip


def quantize(x: Tensor, static_scale: Tensor | None, values: Tensor, scale: Tensor, *, gelu: bool) -> None:
    """x [M, C], last dimension dense, -> values [..., P] and scale [..., 1], both contiguous."""
    if x.shape[0] == 0:
        return
    options = row_options(x.shape[1], values.shape[-1], WARP_COLUMNS, MOST_PIECES)
    static = scale if static_scale is None else static_scale
    with torch.cuda.device_of(x):
        _quantize[(x.shape[0],)](
            x, static, values, scale, x.stride(0), x.shape[1], values.shape[-1],
            GELU=gelu, STATIC=static_scale is not None, **options,
        )  # fmt: skip


def norm_quantize(x: Tensor, gain: Tensor, shift: Tensor, values: Tensor, scale: Tensor, *, eps: float) -> None:
    """x [B, L, C]; gain and shift float32, [C] or [B, 1 or L, C], last dimension dense."""
    _launch_norm(x, gain, shift, values, scale, eps)


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, out: Tensor, *, eps: float) -> None:
    """The same into `out` [B, L, C], contiguous, of any floating-point type."""
    _launch_norm(x, gain, shift, out, None, eps)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """RMSNorm(x [B, L, C]) * weight [C] into `out` [B, L, C], contiguous."""
    _launch_norm(x, weight, None, out, None, eps)


def _launch_norm(x: Tensor, gain: Tensor, shift: Tensor | None, out: Tensor, scale: Tensor | None, eps: float) -> None:
    """shift: None of an RMS norm, whose gain all tokens share."""
    batch, tokens, columns = x.shape
    if x.numel() == 0:
        return
    operands = (x, gain.expand(x.shape), (gain if shift is None else shift).expand(x.shape))
    strides = [t.stride(dim) for t in operands for dim in (0, 1)]
    # A modulation that all tokens share weighs more than a row: it is read once for several.
    shared = _shared(*operands[1:])
    rows = SHARED_ROWS if shared and tokens >= MANY_TOKENS else 1
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(tokens, rows), batch)](
            *operands, out, out if scale is None else scale, columns, out.shape[-1], tokens, *strides, eps,
            QUANTIZE=scale is not None, RMS=shift is None, SHARED=shared, ROWS=rows,
            **row_options(columns, out.shape[-1], NORM_WARP_COLUMNS, NORM_MOST_PIECES),
        )  # fmt: skip


def _shared(*modulation: Tensor) -> bool:
    return all(t.stride(1) == 0 or t.shape[1] == 1 for t in modulation)
