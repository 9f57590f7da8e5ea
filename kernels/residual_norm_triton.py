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
def _of_row(base, batch, token, tokens, columns, OF: tl.constexpr):
    """Where gate, gain or shift of a row begin: one for all, one for each video, or one for each token."""
    if OF == 2:
        base += (batch * tokens + token) * columns
    elif OF == 1:
        base += batch * columns
    return base


@triton.jit
def _residual_norm(x, y, gate, gain, shift, total, out, scales, columns, columns_out, tokens, eps,
                   QUANTIZE: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, GAIN: tl.constexpr,
                   SHIFT: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
                   FULL: tl.constexpr):  # fmt: skip
    SHARED: tl.constexpr = GATE < 2 and GAIN < 2 and SHIFT < 2
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    x += batch * tokens * columns
    y += batch * tokens * columns
    if SHARED:
        g = _load_row(_of_row(gain, batch, token, tokens, columns, GAIN), True, columns, PIECE, PIECES, FULL)
        s = _load_row(_of_row(shift, batch, token, tokens, columns, SHIFT), True, columns, PIECE, PIECES, FULL)
        # Without a gate this name is never read.
        f = g
        if GATED:
            f = _load_row(_of_row(gate, batch, token, tokens, columns, GATE), True, columns, PIECE, PIECES, FULL)
    ahead = _load_row(x + token * columns, True, columns, PIECE, PIECES, FULL)
    ahead_y = _load_row(y + token * columns, True, columns, PIECE, PIECES, FULL)
    for _ in range(ROWS):
        a, b = ahead, ahead_y
        following = token + tl.num_programs(0)
        ahead = _load_row(x + following * columns, following < tokens, columns, PIECE, PIECES, FULL)
        ahead_y = _load_row(y + following * columns, following < tokens, columns, PIECE, PIECES, FULL)
        if not SHARED:
            here = token < tokens
            g = _load_row(_of_row(gain, batch, token, tokens, columns, GAIN), here, columns, PIECE, PIECES, FULL)
            s = _load_row(_of_row(shift, batch, token, tokens, columns, SHIFT), here, columns, PIECE, PIECES, FULL)
            f = g
            if GATED:
                f = _load_row(_of_row(gate, batch, token, tokens, columns, GATE), here, columns, PIECE, PIECES, FULL)
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

    Gate, gain and shift are float32, [C] or [B, 1 or L, C]. All are contiguous.
    """
    x, y, gate = terms
    total, out, scale = results
    batch, tokens, columns = x.shape
    if x.numel() == 0:
        return
    gated = gate is not None
    rows_of = [_laid_out(t, x) for t in (gate if gated else modulation[0], *modulation)]
    of = dict(zip(("GATE", "GAIN", "SHIFT"), (kind for _, kind in rows_of), strict=True))
    rows = SHARED_ROWS if max(of.values()) < 2 and tokens >= MANY_TOKENS else 1
    with torch.cuda.device_of(x):
        _residual_norm[(triton.cdiv(tokens, rows), batch)](
            x, y, *(t for t, _ in rows_of), total, out, out if scale is None else scale, columns, out.shape[-1],
            tokens, eps, QUANTIZE=scale is not None, GATED=gated, ROWS=rows, **of,
            **row_options(columns, out.shape[-1], WARP_COLUMNS, MOST_PIECES),
        )  # fmt: skip


def _laid_out(t: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """t [C] or [1 or B, 1 or L, C], and its rows: one (0), one for each video (1), or one for each token (2)."""
    if t.numel() == t.shape[-1]:
        return t, 0
    # A dimension that is there once although there are several videos.
    return t.expand(x.shape[0], -1, -1).contiguous(), 1 if t.shape[1] == 1 else 2
