"""LayerNorm with modulation, and RMS norm, in one kernel each, for layers that read them in base precision.

The modulation is float32 whatever the activation's type: comfy-kitchen's `adaln` reads both in the activation's type,
so it cannot be used here. On the CPU, and where Triton does not run, an operator is the eager PyTorch beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * gain + shift, rounded once, to x's dtype.

    x [B, L, C]; gain, shift float32, [C] or [B, 1 or L, C].
    """
    return _norm_modulate_op(x, gain, shift, eps)


def norm_modulate_eager(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """What the kernel must equal."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(shift.to(wide), F.layer_norm(x.to(wide), x.shape[-1:], eps=eps), gain.to(wide)).to(x.dtype)


@torch.library.custom_op(op_name("norm_modulate"), mutates_args=())
def _norm_modulate_op(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float64 or not triton_runs(x.device):
        return norm_modulate_eager(x, gain, shift, eps)
    x, gain, shift = kernel_ready(x), kernel_ready(gain), kernel_ready(shift)
    check_entry("norm_modulate", x=x, gain=gain, shift=shift)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels("fp8_rows_triton").norm_modulate(x, gain.float(), shift.float(), out, eps=eps)
    return out


@_norm_modulate_op.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x [B, L, C]) * weight [C], rounded once, to x's dtype (Zhang and Sennrich 2019)."""
    return _rms_norm_op(x, weight, eps)


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the kernel must equal, for x [..., C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


@torch.library.custom_op(op_name("rms_norm"), mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float64 or not triton_runs(x.device):
        return rms_norm_eager(x, weight, eps)
    x, weight = kernel_ready(x), kernel_ready(weight)
    check_entry("rms_norm", x=x, weight=weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels("fp8_rows_triton").rms_norm(x, weight, out, eps=eps)
    return out


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
