"""Weights in NVFP4: value = E2M1 code * E4M3 scale of its 16 columns * one float32 scale.

Storage and names are those of ComfyUI's files (`comfy_quant`: "nvfp4"): weight uint8 [P, Q / 2], weight_scale in
cuBLAS' order of 128 x 4 tiles, weight_scale_2. `Nvfp4Linear` expands it to the activation's type (W4A16),
`Nvfp4Fp8Linear` to FP8 for FP8 tensor cores (W4A8), `Nvfp4MatmulLinear` multiplies it by NVFP4 activations on Blackwell
(W4A4).
P, Q: N and K rounded up with zeros, to 16 and 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen.registry import registry
from torch import Tensor

from ..kernels.fp8_rows import LARGEST, Fp8Rows, padded_size, quantize
from ..kernels.nvfp4 import BLOCK, CODES_PER_BYTE, LARGEST_CODE, codes_to_values, expand, unswizzled
from ..tensor_layout import check_entry, kernel_ready
from .fp8 import rows_product
from .linear import BLACKWELL, ROW_MULTIPLE, QuantizedLinear, activation_scale, check_columns, frozen, padded

TINY = 1e-30
SMALLEST_SCALE = 2**-9
# What the CUDA kernel of comfy-kitchen reads; the rounding to bfloat16 is far below that to FP4.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class Nvfp4(NamedTuple):
    """A matrix in NVFP4: codes uint8 [P, Q / 2]; block_scale E4M3 in cuBLAS' order; scale float32, 0-d."""

    codes: Tensor
    block_scale: Tensor
    scale: Tensor


def quantize_nvfp4(t: Tensor, scale: Tensor | None = None) -> Nvfp4:
    """A matrix [N, K] of any precision in NVFP4; without `scale` one that fits its largest value, measured here."""
    if scale is None:
        scale = largest_scale(t)
    if padded_size(t.shape[1]) != t.shape[1]:
        t = F.pad(t, (0, padded_size(t.shape[1]) - t.shape[1]))
    return Nvfp4(*comfy_kitchen.quantize_nvfp4(kernel_ready(t, strided=False), scale, pad_16x=True), scale)


def largest_scale(t: Tensor) -> Tensor:
    """The float32 scale, 0-d, with which the largest value of `t` is the largest that codes and scales can say."""
    return t.abs().amax().float().clamp(min=TINY) / (LARGEST * LARGEST_CODE)


def values_of(q: Nvfp4) -> Tensor:
    """float32 [P, Q] in plain PyTorch."""
    codes = codes_to_values(q.codes)
    scale = unswizzled(q.block_scale, *codes.shape) * q.scale
    return (codes.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


class Nvfp4Linear(QuantizedLinear):
    """NVFP4 weight, bias [N]; the product is one of the activation's type (W4A16)."""

    label = "NVFP4 weights, expanded for the product"

    def __init__(self, weight: Nvfp4, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(*shape, bias)
        self._store(weight)

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """From a weight [N, K] in any precision. Plain PyTorch in float32: machines differ at ties at most."""
        with registry.use_backend("eager"):
            return cls(quantize_nvfp4(weight.float()), tuple(weight.shape), bias)

    def _store(self, q: Nvfp4) -> None:
        columns = padded_size(q.codes.shape[1] * CODES_PER_BYTE) // CODES_PER_BYTE
        self.weight = frozen(padded(q.codes, padded_size(q.codes.shape[0], ROW_MULTIPLE), columns))
        self.weight_scale = frozen(q.block_scale)
        self.weight_scale_2 = frozen(q.scale.float().reshape(()))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.weight, self.weight_scale, self.weight_scale_2

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, block_scale, scale = stored[:3]
        # comfy-kitchen's eager form rounds the scale to the type that it is asked for. float16 has nothing below 6e-8,
        # and scales are a 2,688th of the largest weight: some would become 0.
        asked = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return comfy_kitchen.dequantize_nvfp4(codes, scale, block_scale, output_type=asked).to(dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return Nvfp4MatmulLinear if runs_fp4(device) else Nvfp4Fp8Linear

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values, in plain PyTorch."""
        return values_of(Nvfp4(*self.stored[:3]))[: self.out_features, : self.in_features].to(dtype)

    def add(self, difference: Tensor) -> None:
        """All scales become new ones."""
        with registry.use_backend("eager"):
            self._store(quantize_nvfp4(self.expanded(torch.float32) + difference))


class Nvfp4Fp8Linear(Nvfp4Linear):
    """NVFP4 weight, expanded to FP8 for an FP8 product (W4A8): half the weights' memory at nearly FP8's speed."""

    label = "NVFP4 weights, expanded to FP8 for FP8 products"
    takes_rows = True

    def _store(self, q: Nvfp4) -> None:
        super()._store(q)
        rows, columns = self.weight.shape[0], self.weight.shape[1] * CODES_PER_BYTE
        largest = unswizzled(self.weight_scale, rows, columns).amax(dim=1, keepdim=True) * LARGEST_CODE
        # A power of two: multiplying by it is exact, and the result stays as precise as FP8 can say it.
        factor = torch.exp2(torch.floor(torch.log2(LARGEST / largest.clamp(min=SMALLEST_SCALE))))
        self.factor = frozen(factor)
        self.row_scale = frozen(self.weight_scale_2 / factor)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Raises ValueError for another K."""
        check_columns(x, self.in_features)
        rows = quantize(x) if isinstance(x, Tensor) else x
        weight = expand(self.weight, self.weight_scale, self.factor)
        return rows_product(rows, weight, self.row_scale, self.bias, self.out_features)


class Nvfp4MatmulLinear(Nvfp4Linear):
    """NVFP4 weight and activations (W4A4), on Blackwell tensor cores through comfy-kitchen.

    input_scale: a scale of all activations from the file; None measures every activation as it comes.
    """

    label = "NVFP4 weights and NVFP4 products"

    def __init__(
        self, weight: Nvfp4, shape: tuple[int, int], bias: Tensor | None, input_scale: Tensor | None = None
    ) -> None:
        super().__init__(weight, shape, bias)
        static = activation_scale(input_scale, weight.codes.device)
        self.input_scale = None if static is None else frozen(static)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        # Not super(), whose properties torch.compile cannot read.
        weight = self.weight, self.weight_scale, self.weight_scale_2
        return weight if self.input_scale is None else (*weight, self.input_scale)

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        rows = x.bfloat16() if x.is_cuda and x.dtype not in KERNEL_DTYPES else x
        product = _multiply(quantize_nvfp4(rows, *stored[3:]), Nvfp4(*stored[:3]), bias)
        return product[: x.shape[0], :out_features].to(x.dtype).contiguous()


def _multiply(rows: Nvfp4, weight: Nvfp4, bias: Tensor | None) -> Tensor:
    """[M, Q] times [P, Q] transposed, plus bias; without FP4 tensor cores what they compute, in float32."""
    if bias is not None:
        bias = F.pad(bias, (0, weight.codes.shape[0] - bias.shape[0]))
    if not runs_fp4(rows.codes.device):
        product = values_of(rows) @ values_of(weight).t()
        return product if bias is None else product + bias
    bias = None if bias is None else kernel_ready(bias.to(torch.bfloat16))
    check_entry(
        "scaled_mm_nvfp4", strided=False, rows=rows.codes, weight=weight.codes, row_scale=rows.block_scale,
        weight_scale=weight.block_scale, bias=bias,
    )  # fmt: skip
    return comfy_kitchen.scaled_mm_nvfp4(
        rows.codes, weight.codes, rows.scale, weight.scale, rows.block_scale, weight.block_scale, bias=bias,
        out_dtype=torch.bfloat16,
    )  # fmt: skip


def runs_fp4(device: torch.device) -> bool:
    """Whether the device has FP4 tensor cores (Blackwell)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BLACKWELL
