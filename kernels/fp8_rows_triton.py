"""Triton kernels of fp8_rows.py: one program a row, the whole row in registers, so that it is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)
WIDE_ROW = 8192


@triton.jit
def _store_row(y, inside, column, values, scales, row, columns_out, STATIC: tl.constexpr, static):
    if STATIC:
        scale = tl.load(static).to(tl.float32)
        q = tl.clamp(y * tl.div_rn(1.0, scale), -LARGEST, LARGEST)
    else:
        largest = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0), axis=0), TINY)
        scale = largest * (1.0 / LARGEST)
        # In the order of PyTorch, which divides a number by a tensor as reciprocal times number: else ties differ.
        q = y * (tl.div_rn(1.0, largest) * LARGEST)
    tl.store(scales + row, scale)
    q = tl.where(inside, q, 0.0).to(tl.float8e4nv)
    tl.store(values + row * columns_out + column, q, mask=column < columns_out)


@triton.jit
def _quantise(x, static, values, scales, pitch, columns, columns_out,
              GELU: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    y = tl.load(x + row * pitch + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    _store_row(y, inside, column, values, scales, row, columns_out, STATIC, static)


@triton.jit
def _normed_row(x, gain, shift, columns, tokens, x_batch, x_token, gain_batch, gain_token,
                shift_batch, shift_token, eps, column, inside):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    y = tl.load(x + batch * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(y, axis=0) / columns
    centred = tl.where(inside, y - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / columns
    y = centred * tl.rsqrt(variance + eps)
    g = tl.load(gain + batch * gain_batch + token * gain_token + column, mask=inside, other=0.0)
    s = tl.load(shift + batch * shift_batch + token * shift_token + column, mask=inside, other=0.0)
    return y * g + s


@triton.jit
def _norm_quantise(x, gain, shift, values, scales, columns, columns_out, tokens,
                   x_batch, x_token, gain_batch, gain_token, shift_batch, shift_token,
                   eps, BLOCK: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < columns
    y = _normed_row(x, gain, shift, columns, tokens, x_batch, x_token, gain_batch, gain_token,
                    shift_batch, shift_token, eps, column, inside)  # fmt: skip
    _store_row(y, inside, column, values, scales, tl.program_id(0).to(tl.int64), columns_out, False, scales)


@triton.jit
def _norm_modulate(x, gain, shift, out, columns, tokens,
                   x_batch, x_token, gain_batch, gain_token, shift_batch, shift_token,
                   eps, BLOCK: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < columns
    y = _normed_row(x, gain, shift, columns, tokens, x_batch, x_token, gain_batch, gain_token,
                    shift_batch, shift_token, eps, column, inside)  # fmt: skip
    tl.store(out + tl.program_id(0).to(tl.int64) * columns + column, y.to(out.dtype.element_ty), mask=inside)


def _launch_options(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": 16 if block > WIDE_ROW else 8 if block > 1024 else 4}


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
    if x.numel() == 0:
        return
    sizes = (x.shape[2], values.shape[-1], x.shape[1])
    with torch.cuda.device_of(x):
        _norm_quantise[(x.shape[0] * x.shape[1],)](
            *_operands(x, gain, shift), values, scale, *sizes, *_row_strides(x, gain, shift),
            eps, **_launch_options(values.shape[-1]),
        )  # fmt: skip


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, out: Tensor, *, eps: float) -> None:
    """The same into `out` [B, L, C], contiguous, of any floating-point type."""
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        _norm_modulate[(x.shape[0] * x.shape[1],)](
            *_operands(x, gain, shift), out, x.shape[2], x.shape[1], *_row_strides(x, gain, shift),
            eps, **_launch_options(x.shape[2]),
        )  # fmt: skip


def _operands(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, gain.expand(x.shape), shift.expand(x.shape)


def _row_strides(x: Tensor, gain: Tensor, shift: Tensor) -> list[int]:
    return [t.stride(dim) for t in _operands(x, gain, shift) for dim in (0, 1)]
