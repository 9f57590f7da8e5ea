"""Numbers in FP8 with one scale a row: quantizing activations alone, behind a GELU, and behind a LayerNorm with
modulation, and expanding weights.

Scales map each row's largest value to E4M3's largest (448), in float32; the rest of a row keeps its relative precision
whatever other rows hold. Each operator is the eager PyTorch beside it on the CPU and one Triton kernel on a GPU.
Shapes: C channels, P channels rounded up to a multiple of 32, which suits FP8 and NVFP4 tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs

ROWS_DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(ROWS_DTYPE).max
TINY = 1e-12
COLUMN_MULTIPLE = 32
LEAST_CAPABILITY = (8, 9)


class Fp8Rows(NamedTuple):
    """A quantized activation that several linear layers can read.

    values [..., P] E4M3, zero behind the first `features`; scale [..., 1] float32, which multiplies them; dtype: that
    of the activation it stands for, and of the layers' results.
    """

    values: Tensor
    scale: Tensor
    features: int
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> Tensor:
        """The activation [..., features], with the rounding that it went through."""
        return (self.values[..., : self.features].float() * self.scale).to(dtype)


def padded_size(size: int, multiple: int = COLUMN_MULTIPLE) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def quantize(x: Tensor, static_scale: Tensor | None = None) -> Fp8Rows:
    """x [..., C] in FP8; with `static_scale`, 0-d, that one for all rows, and larger values saturate."""
    if x.shape[-1] == 0:
        # There is nothing to measure, and no kernel for it.
        return Fp8Rows(x.to(ROWS_DTYPE), x.new_ones((*x.shape[:-1], 1), dtype=torch.float32), 0, x.dtype)
    values, scale = _quantize_op(x, static_scale)
    return Fp8Rows(values, scale, x.shape[-1], x.dtype)


def gelu_quantize(x: Tensor) -> Fp8Rows:
    """GELU (tanh form) of x [..., C] in FP8, without rounding in between."""
    values, scale = _gelu_op(x)
    return Fp8Rows(values, scale, x.shape[-1], x.dtype)


def norm_quantize(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Fp8Rows:
    """LayerNorm(x) * gain + shift in FP8. x [B, L, C]; gain, shift float32, [C] or [B, 1 or L, C]."""
    values, scale = _norm_op(x, gain, shift, eps)
    return Fp8Rows(values, scale, x.shape[-1], x.dtype)


def expand_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 values [N, P] times their rows' scales [N, 1], float32, rounded once to `dtype`; contiguous."""
    if not _has_expand_kernel(values.device):
        return expand_rows_eager(values, scale, dtype)
    values, scale = kernel_ready(values, strided=False), kernel_ready(scale, strided=False)
    check_entry("fp8_expand_rows", strided=False, values=values, scale=scale)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    triton_kernels("fp8_rows_triton").expand_rows(values, scale, out)
    return out


def expand_rows_eager(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel must equal. FP8 values are exact in every base precision, so that only the product rounds."""
    return values.to(dtype).mul_(scale)


def _has_expand_kernel(device: torch.device) -> bool:
    """Triton reads E4M3 where the GPU itself does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY and triton_runs(device)


def quantize_eager(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values [..., P] and scales [..., 1] of x [..., C]: what the kernel must equal."""
    wide = x.float()
    if static_scale is None:
        largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
        values, scale = wide * (LARGEST / largest), largest * (1 / LARGEST)
    else:
        values = (wide * (1 / static_scale)).clamp(-LARGEST, LARGEST)
        scale = static_scale.expand(*x.shape[:-1], 1).clone(memory_format=torch.contiguous_format)
    return F.pad(values, (0, padded_size(x.shape[-1]) - x.shape[-1])).to(ROWS_DTYPE), scale


def gelu_quantize_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of GELU(x)."""
    return quantize_eager(F.gelu(x.float(), approximate="tanh"))


def norm_quantize_eager(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same of LayerNorm(x) * gain + shift."""
    return quantize_eager(torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), gain))


@torch.library.custom_op(op_name("fp8_quantize"), mutates_args=())
def _quantize_op(x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        return quantize_eager(x, static_scale)
    rows, static_scale = _rows(x), None if static_scale is None else kernel_ready(static_scale)
    check_entry("fp8_quantize", x=rows, static_scale=static_scale)
    values, scale = empty_rows(x)
    triton_kernels("fp8_rows_triton").quantize(rows, static_scale, values, scale, gelu=False)
    return values, scale


@torch.library.custom_op(op_name("fp8_gelu_quantize"), mutates_args=())
def _gelu_op(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        return gelu_quantize_eager(x)
    rows = _rows(x)
    check_entry("fp8_gelu_quantize", x=rows)
    values, scale = empty_rows(x)
    triton_kernels("fp8_rows_triton").quantize(rows, None, values, scale, gelu=True)
    return values, scale


@torch.library.custom_op(op_name("fp8_norm_quantize"), mutates_args=())
def _norm_op(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        return norm_quantize_eager(x, gain, shift, eps)
    x, gain, shift = kernel_ready(x), kernel_ready(gain), kernel_ready(shift)
    check_entry("fp8_norm_quantize", x=x, gain=gain, shift=shift)
    values, scale = empty_rows(x)
    triton_kernels("fp8_rows_triton").norm_quantize(x, gain, shift, values, scale, eps=eps)
    return values, scale


@_quantize_op.register_fake
def _(x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


@_gelu_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


@_norm_op.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [M, C], kernel-ready."""
    return kernel_ready(x.reshape(-1, x.shape[-1]))


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the values and scales of x [..., C] as FP8 rows."""
    values = torch.empty((*x.shape[:-1], padded_size(x.shape[-1])), dtype=ROWS_DTYPE, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
