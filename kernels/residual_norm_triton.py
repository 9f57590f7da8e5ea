"""Triton kernel of residual_norm.py: a program some rows, each in registers from the sum to the rounded norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8_rows_triton import MANY_TOKENS, SHARED_ROWS, _load_row, _normed, _store_pieces, _store_row, row_options

# As of a norm alone: results are equal to the bit, and with more warps a row takes a quarter longer.
WARP_COLUMNS, MOST_PIECES = 256, 5


@triton.jit
def _sums(x, y, gates, GATED: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(x)):
        a, b = x[i].to(tl.float32), y[i].to(tl.float32)
        if GATED:
            a += b * gates[i]
        else:
            a += b
        pieces += (a.to(x[i].dtype),)
    return pieces


@triton.jit
def _residual_norm(x, y, gate, gain, shift, total, out, scales, columns, columns_out, tokens, x_batch, x_token,
                   y_batch, y_token, gate_batch, gate_token, gain_batch, gain_token, shift_batch, shift_token, eps,
                   QUANTIZE: tl.constexpr, GATED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
                   PIECE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    x += batch * x_batch
    y += batch * y_batch
    gate += batch * gate_batch
    gain += batch * gain_batch
    shift += batch * shift_batch
    if SHARED:
        g = _load_row(gain, True, columns, PIECE, PIECES, FULL)
        s = _load_row(shift, True, columns, PIECE, PIECES, FULL)
        # Without a gate this name is never read.
        f = g
        if GATED:
            f = _load_row(gate, True, columns, PIECE, PIECES, FULL)
    ahead = _load_row(x + token * x_token, True, columns, PIECE, PIECES, FULL)
    ahead_y = _load_row(y + token * y_token, True, columns, PIECE, PIECES, FULL)
    for _ in range(ROWS):
        a, b = ahead, ahead_y
        following = token + tl.num_programs(0)
        ahead = _load_row(x + following * x_token, following < tokens, columns, PIECE, PIECES, FULL)
        ahead_y = _load_row(y + following * y_token, following < tokens, columns, PIECE, PIECES, FULL)
        if not SHARED:
            g = _load_row(gain + token * gain_token, token < tokens, columns, PIECE, PIECES, FULL)
            s = _load_row(shift + token * shift_token, token < tokens, columns, PIECE, PIECES, FULL)
            f = g
            if GATED:
                f = _load_row(gate + token * gate_token, token < tokens, columns, PIECE, PIECES, FULL)
        pieces = _sums(a, b, f, GATED)
        z = _normed(pieces, g, s, columns, eps, False, PIECE, FULL)
        if token < tokens:
            row = batch * tokens + token
            _store_pieces(pieces, total + row * columns, columns, PIECE, FULL)
            if QUANTIZE:
                _store_row(z, out, scales, row, columns_out, False, scales, PIECE, FULL)
            else:
                _store_pieces(z, out + row * columns_out, columns, PIECE, FULL)
        token = following


def residual_norm(
    terms: tuple[Tensor, Tensor, Tensor | None],
    modulation: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor | None],
    *,
    eps: float,
) -> None:
    """x, y [B, L, C] and a gate; gain and shift; into the sum, the norm [B, L, P], and the scales of FP8 rows.

    Gate, gain and shift are float32, [C] or [B, 1 or L, C]. Inputs have a dense last dimension, results are contiguous.
    """
    x, y, gate = terms
    total, out, scale = results
    batch, tokens, columns = x.shape
    if x.numel() == 0:
        return
    gated = gate is not None
    operands = (x, y, *(t.expand(x.shape) for t in (gate if gated else modulation[0], *modulation)))
    strides = [t.stride(dim) for t in operands for dim in (0, 1)]
    shared = all(t.stride(1) == 0 or t.shape[1] == 1 for t in operands[2:])
    rows = SHARED_ROWS if shared and tokens >= MANY_TOKENS else 1
    with torch.cuda.device_of(x):
        _residual_norm[(triton.cdiv(tokens, rows), batch)](
            *operands, total, out, out if scale is None else scale, columns, out.shape[-1], tokens, *strides, eps,
            QUANTIZE=scale is not None, GATED=gated, SHARED=shared, ROWS=rows,
            **row_options(columns, out.shape[-1], WARP_COLUMNS, MOST_PIECES),
        )  # fmt: skip
