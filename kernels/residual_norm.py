"""A residual sum and the LayerNorm that reads it, in one pass: the sum is written and not read again.

Equal to the bit to `gated_residual` and the norm behind it. On the CPU, and where Triton does not run, the operators
are eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs
from .fp8_rows import Fp8Rows, empty_rows, norm_quantize_eager
from .gated_residual import gated_residual_eager
from .modulated_norm import norm_modulate_eager


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + y * gate (None: x + y), rounded to x's dtype, and LayerNorm(that) * gain + shift in the same dtype.

    x, y [B, L, C]; gate, gain, shift float32, [C] or [B, 1 or L, C]; gate also 0-d.
    """
    return _residual_norm_op(x, y, gate, gain, shift, eps)


def residual_norm_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Fp8Rows]:
    """The same with the norm in FP8, a scale a row."""
    total, values, scale = _residual_norm_quantize_op(x, y, gate, gain, shift, eps)
    return total, Fp8Rows(values, scale, x.shape[-1], x.dtype)


def _sum_eager(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else gated_residual_eager(x, y, gate)


@torch.library.custom_op(op_name("residual_norm"), mutates_args=())
def _residual_norm_op(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not x.is_cuda or x.dtype == torch.float64 or not triton_runs(x.device):
        total = _sum_eager(x, y, gate)
        return total, norm_modulate_eager(total, gain, shift, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launched(x, y, gate, gain, shift, eps, out, None), out


@torch.library.custom_op(op_name("residual_norm_quantize"), mutates_args=())
def _residual_norm_quantize_op(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.is_cuda:
        total = _sum_eager(x, y, gate)
        return total, *norm_quantize_eager(total, gain, shift, eps)
    values, scale = empty_rows(x)
    return _launched(x, y, gate, gain, shift, eps, values, scale), values, scale


def _launched(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float, out: Tensor,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The sum, with the norm of it in `out`."""
    x, y, gain, shift = (kernel_ready(t, strided=False) for t in (x, y, gain.float(), shift.float()))
    if gate is not None:
        gate = gate.expand(x.shape[-1]) if gate.dim() == 0 else gate
        gate = kernel_ready(gate.float(), strided=False)
    check_entry("residual_norm", strided=False, x=x, y=y, gate=gate, gain=gain, shift=shift)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels("residual_norm_triton").residual_norm((x, y, gate), (gain, shift), (total, out, scale), eps=eps)
    return total


@_residual_norm_op.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_residual_norm_quantize_op.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *empty_rows(x)
