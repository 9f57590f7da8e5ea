"""Weights in MXFP8: value = E4M3 code * E8M0 scale of its 32 columns, a power of two.

Storage and names are those of ComfyUI's files (`comfy_quant`: "mxfp8"): weight E4M3 [P, Q], weight_scale in cuBLAS'
order of 128 x 4 tiles. P, Q: N and K rounded up with zeros to 32. Source: comfy-kitchen (TensorCoreMXFP8Layout), OCP
Microscaling Formats 1.0.
"""

from __future__ import annotations

from typing import Self

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen.registry import registry
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import kernel_ready
from .linear import QuantizedLinear, check_columns, frozen, product

BLOCK = 32


def mxfp8_values(codes: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [P, Q] and scales in cuBLAS' order -> the values [P, Q]. A power of two changes no digit."""
    rows, columns = codes.shape
    scale = comfy_kitchen.from_blocked(block_scale.view(torch.uint8), num_rows=rows, num_cols=columns // BLOCK)
    wide = codes.float().unflatten(-1, (-1, BLOCK)).mul_(scale.view(torch.float8_e8m0fnu).float().unsqueeze(-1))
    return wide.flatten(-2).to(dtype)


class Mxfp8Linear(QuantizedLinear):
    """MXFP8 weight, bias [N]; the product is one of the activation's type. shape: (N, K)."""

    label = "MXFP8 weights, expanded for the product"

    def __init__(self, codes: Tensor, block_scale: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(*shape, bias)
        self._store(codes, block_scale)

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """From a weight [N, K] in any precision, in plain PyTorch."""
        return cls(*_quantized(weight), tuple(weight.shape), bias)

    def _store(self, codes: Tensor, block_scale: Tensor) -> None:
        self.weight, self.weight_scale = frozen(codes), frozen(block_scale.view(torch.uint8))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values."""
        return mxfp8_values(self.weight, self.weight_scale, dtype)[: self.out_features, : self.in_features]

    def add(self, difference: Tensor) -> None:
        """All scales become new ones."""
        self._store(*_quantized(self.expanded(torch.float32) + difference))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Raises ValueError for another K."""
        check_columns(x, self.in_features)
        return _weight_only(x, self.weight, self.weight_scale, self.bias, self.out_features)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (-size % BLOCK for size in weight.shape)
    full = kernel_ready(F.pad(weight.float(), (0, columns, 0, rows)), strided=False)
    with registry.use_backend("eager"):
        return comfy_kitchen.quantize_mxfp8(full)


@torch.library.custom_op(op_name("mxfp8_weight_only"), mutates_args=())
def _weight_only(x: Tensor, codes: Tensor, block_scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    wide = mxfp8_values(codes, block_scale, x.dtype)[:out_features, : x.shape[-1]]
    return product("mxfp8_weight_only", x, wide, bias)


@_weight_only.register_fake
def _(x: Tensor, codes: Tensor, block_scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
