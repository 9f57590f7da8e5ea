"""Triton kernels of fp8_rows.py: a whole row in registers, so that it is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)
WARP_BYTES = 4096
# Enough tokens to keep a GPU busy while every program takes several of them.
MANY_TOKENS, SHARED_ROWS = 8192, 16


# y is 0 behind the last column: loads put it there, and every step before keeps it.
@triton.jit
def _store_row(y, column, values, scales, row, columns_out, STATIC: tl.constexpr, static):
    if STATIC:
        scale = tl.load(static).to(tl.float32)
        q = tl.clamp(y * tl.div_rn(1.0, scale), -LARGEST, LARGEST)
    else:
        largest = tl.maximum(tl.max(tl.abs(y), axis=0), TINY)
        scale = largest * (1.0 / LARGEST)
        # In the order of PyTorch, which divides a number by a tensor as reciprocal times number: else ties differ.
        q = y * (tl.div_rn(1.0, largest) * LARGEST)
    tl.store(scales + row, scale)
    tl.store(values + row * columns_out + column, q.to(tl.float8e4nv), mask=column < columns_out)


@triton.jit
def _quantise(x, static, values, scales, pitch, columns, columns_out,
              GELU: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    y = tl.load(x + row * pitch + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    _store_row(y, column, values, scales, row, columns_out, STATIC, static)


@triton.jit
def _modulation(gain, shift, column, inside):
    g = tl.load(gain + column, mask=inside, other=0.0)
    return g, tl.load(shift + column, mask=inside, other=0.0)


@triton.jit
def _norm(x, gain, shift, out, scales, columns, columns_out, tokens, x_batch, x_token, gain_batch, gain_token,
          shift_batch, shift_token, eps,
          QUANTISE: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x += batch * x_batch
    gain += batch * gain_batch
    shift += batch * shift_batch
    if SHARED:
        g, s = _modulation(gain, shift, column, inside)
    ahead = tl.load(x + token * x_token + column, mask=inside, other=0.0)
    for _ in range(ROWS):
        y = ahead.to(tl.float32)
        following = token + tl.num_programs(0)
        ahead = tl.load(x + following * x_token + column, mask=inside & (following < tokens), other=0.0)
        if not SHARED:
            g, s = _modulation(gain + token * gain_token, shift + token * shift_token, column, inside)
        mean = tl.sum(y, axis=0) / columns
        centred = tl.where(inside, y - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / columns
        y = centred * tl.rsqrt(variance + eps) * g + s
        if token < tokens:
            row = batch * tokens + token
            if QUANTISE:
                _store_row(y, column, out, scales, row, columns_out, False, scales)
            else:
                tl.store(out + row * columns_out + column, y.to(out.dtype.element_ty), mask=inside)
        token = following


def _launch_options(columns: int, bytes_each: int = 2) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block * bytes_each // WARP_BYTES, 4), 32)}


def quantise(x: Tensor, static_scale: Tensor | None, values: Tensor, scale: Tensor, *, gelu: bool) -> None:
    """x [M, C], last dimension dense, -> values [..., P] and scale [..., 1], both contiguous."""
    if x.shape[0] == 0:
        return
    options = _launch_options(values.shape[-1])
    static = scale if static_scale is None else static_scale
    with torch.cuda.device_of(x):
        _quantise[(x.shape[0],)](
            x, static, values, scale, x.stride(0), x.shape[1], values.shape[-1],
            GELU=gelu, STATIC=static_scale is not None, **options,
        )  # fmt: skip


def norm_quantise(x: Tensor, gain: Tensor, shift: Tensor, values: Tensor, scale: Tensor, *, eps: float) -> None:
    """x [B, L, C]; gain and shift float32, [C] or [B, 1 or L, C], last dimension dense."""
    _launch_norm(x, gain, shift, values, scale, eps)


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, out: Tensor, *, eps: float) -> None:
    """The same into `out` [B, L, C], contiguous, of any floating-point type."""
    _launch_norm(x, gain, shift, out, None, eps)


def _launch_norm(x: Tensor, gain: Tensor, shift: Tensor, out: Tensor, scale: Tensor | None, eps: float) -> None:
    batch, tokens, columns = x.shape
    if x.numel() == 0:
        return
    operands = (x, gain.expand(x.shape), shift.expand(x.shape))
    strides = [t.stride(dim) for t in operands for dim in (0, 1)]
    # A modulation that all tokens share weighs more than a row: it is read once for several.
    shared = _shared(*operands[1:])
    rows = SHARED_ROWS if shared and tokens >= MANY_TOKENS else 1
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(tokens, rows), batch)](
            *operands, out, out if scale is None else scale, columns, out.shape[-1], tokens, *strides, eps,
            QUANTISE=scale is not None, SHARED=shared, ROWS=rows,
            **_launch_options(out.shape[-1], x.element_size()),
        )  # fmt: skip


def _shared(*modulation: Tensor) -> bool:
    return all(t.stride(1) == 0 or t.shape[1] == 1 for t in modulation)
