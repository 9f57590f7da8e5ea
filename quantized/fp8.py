"""Weights in FP8 (E4M3 or E5M2): value = weight * scale, a float32 scale for each output row.

`Fp8Linear` expands the weight to the activation's type; `Fp8MatmulLinear` multiplies on FP8 tensor cores, activations
in E4M3 with a scale for each row. Weights are stored [P, Q], N and K rounded up with zeros to multiples of 16 and 32,
as tensor cores need. Those give bfloat16, whose rounding is 20 dB below that of the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import holds, in_a_line, op_name
from ..kernels.fp8_rows import LEAST_CAPABILITY, Fp8Rows, expand_rows, padded_size, quantize
from ..tensor_layout import check_entry, kernel_ready
from .linear import ROW_MULTIPLE, QuantizedLinear, activation_scale, check_columns, frozen, moved, padded

FP8_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TINY = 1e-12


def refuse_without_fp8(what: str, device: torch.device) -> None:
    """Raise ValueError, which begins with `what`, where the device has no FP8 at all, not even to keep it."""
    if not holds(device, torch.float8_e4m3fn):
        raise ValueError(
            f"{what} weights in FP8, which '{device.type}' devices do not have: use a file in bf16, fp16 or GGUF, with "
            "quantization 'disabled'."
        )


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> FP8 [N, K] and float32 scales [N, 1] that map each row's largest value to the format's."""
    # No second weight in float32 but the quotient: this runs at load, for the largest layer too.
    largest = torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True)).float()
    scale = largest.clamp(min=TINY) / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def row_scales(scale: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """A scale of a tensor (any shape of one value), of its rows, or none -> float32 [rows, 1] on `device`.

    Raises ValueError for another number of values.
    """
    if scale is None:
        return torch.ones(rows, 1, device=device)
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"A weight scale of shape {tuple(scale.shape)} fits no weight of {rows} rows: it must have one value, or "
            "one a row; use another quantized file of the model."
        )
    return moved(scale, device).reshape(-1, 1).expand(rows, 1)


class Fp8Linear(QuantizedLinear):
    """FP8 weight [P, Q], scales [P, 1], bias [N]; the product is one of the activation's type."""

    label = "FP8 weights, expanded for the product"

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        self._store(weight, row_scales(scale, weight.shape[0], weight.device))

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Self:
        """From a weight in any precision."""
        return cls(*quantize_rows(weight, dtype), bias)

    def _store(self, weight: Tensor, scale: Tensor) -> None:
        rows = padded_size(weight.shape[0], ROW_MULTIPLE)
        self.weight = frozen(padded(weight, rows, padded_size(weight.shape[1])))
        self.scale_weight = frozen(F.pad(scale, (0, 0, 0, rows - scale.shape[0])))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.weight, self.scale_weight

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        return expand_rows(*stored, dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return Fp8MatmulLinear

    def add(self, difference: Tensor) -> None:
        """The scales become new ones."""
        self._store(*quantize_rows(self.expanded(torch.float32) + difference, self.weight.dtype))


class Fp8MatmulLinear(Fp8Linear):
    """The same storage, multiplied on FP8 tensor cores.

    input_scale: a scale of all activations, measured when the file was made; None measures every row as it comes.
    """

    label = "FP8 weights and FP8 products"

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, input_scale: Tensor | None = None
    ) -> None:
        super().__init__(weight, scale, bias)
        static = activation_scale(input_scale, weight.device)
        self.scale_input = None if static is None else frozen(static)

    @property
    def takes_rows(self) -> bool:
        """Unless the file gives a scale of this layer's own."""
        return self.scale_input is None

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Raises ValueError for another K."""
        check_columns(x, self.in_features)
        rows = quantize(x, self.scale_input) if isinstance(x, Tensor) else x
        return rows_product(rows, self.weight, self.scale_weight, self.bias, self.out_features)


def rows_product(rows: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """rows [..., K] times weight [P, Q] transposed, plus bias [N]: [..., N] in the dtype that the rows stand for."""
    return _product(rows.values, rows.scale, weight, weight_scale, bias, out_features, rows.dtype)


def runs_fp8(device: torch.device, dtype: torch.dtype = torch.float8_e4m3fn) -> str | None:
    """Why FP8 matrix products cannot run on the device; None where they can (the CPU computes them, slowly).

    On a GPU a small one, with a weight in `dtype`, is run and waited for.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"'{device.type}' devices have none"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and they need 8.9 (RTX 40, L4, Hopper)"
    try:
        ones = torch.ones(16, 32, device=device)
        Fp8MatmulLinear.quantize(ones, None, dtype)(ones)
        torch.cuda.synchronize(device)
    # Whatever stops a first small product (Triton missing or without a compiler, a torch that lacks it) is the reason.
    except Exception as error:
        return f"a first product failed with {in_a_line(error).rstrip('.')}"
    return None


def _multiply(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, row_scale, weight, weight_scale = (
        kernel_ready(t, strided=False) for t in (rows, row_scale, weight, weight_scale)
    )
    bias = None if bias is None else kernel_ready(bias)
    check_entry(
        "torch._scaled_mm", strided=False, rows=rows, row_scale=row_scale, weight=weight, weight_scale=weight_scale,
        bias=bias,
    )  # fmt: skip
    weight_scale = weight_scale.view(1, -1)
    if rows.device.type == "cpu":
        # torch's own product takes a scale a row on CPUs in its latest versions alone.
        product = (rows.float() @ weight.float().t()).mul_(row_scale).mul_(weight_scale)
        return (product if bias is None else product.add_(bias)).to(torch.bfloat16)
    if _scales_rows(weight):
        return _scaled_mm(rows, weight, row_scale, weight_scale, bias)
    # bfloat16 holds the range of unscaled products too.
    one = torch.ones((), device=rows.device)
    product = _scaled_mm(rows, weight, one, one, None).mul_(row_scale).mul_(weight_scale)
    return product if bias is None else product.add_(bias)


def _scaled_mm(rows: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    # Fast accumulation: with a scale a row, the exact one is 15 to 40 % slower than the fast one on Hopper.
    return torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale, scale_b=weight_scale, bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def _scales_rows(weight: Tensor) -> bool:
    """Whether the product itself takes a scale a row, which for E5M2 weights depends on GPU, CUDA and PyTorch."""
    return weight.dtype == torch.float8_e4m3fn or _scales_e5m2_rows(weight.device)


@functools.cache
def _scales_e5m2_rows(device: torch.device) -> bool:
    """Tried once a device: cuBLAS has it for Hopper from CUDA 12.9 on, PyTorch's own kernel wants E4M3 weights.

    Source: PyTorch's ScaledBlas.cpp and RowwiseScaledMM.cu.
    """
    rows, weight = (torch.ones(16, 32, device=device).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
    scale = torch.ones(16, 1, device=device)
    try:
        _scaled_mm(rows, weight, scale, scale.view(1, -1), None)
    # It says no in the words of whichever kernel it would have been.
    except (RuntimeError, ValueError):
        return False
    return True


@torch.library.custom_op(op_name("fp8_product"), mutates_args=())
def _product(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    shape = (*values.shape[:-1], out_features)
    if values.numel() == 0:
        # No rows, or no columns: then the bias alone.
        empty = values.new_zeros(shape, dtype=dtype)
        return empty if bias is None else empty + bias.to(dtype)
    fused = None
    if bias is not None and dtype == torch.bfloat16:
        fused = F.pad(bias.to(dtype), (0, weight.shape[0] - out_features))
    # Flat in between: a dimension of size 1 may have any stride, and the product reads it.
    rows, row_scale = values.reshape(-1).view(-1, values.shape[-1]), scale.reshape(-1).unsqueeze(1)
    product = _multiply(rows, row_scale, weight, weight_scale, fused)[:, :out_features].to(dtype)
    product = product if bias is None or fused is not None else product + bias.to(dtype)
    return product.contiguous().view(shape)


@_product.register_fake
def _(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return values.new_empty((*values.shape[:-1], out_features), dtype=dtype)
