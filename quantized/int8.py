"""Weights in INT8: value = code * scale, a float32 scale for each output row, and perhaps a rotation of the columns.

Storage and names are those of ComfyUI's files (`comfy_quant`: "int8_tensorwise"), of one scale or one a row. With
`convrot`, groups of columns were multiplied by a Hadamard matrix before they were rounded, which spreads outliers; the
matrix is its own inverse. Source: comfy-kitchen (TensorWiseINT8Layout), ConvRot.
"""

from __future__ import annotations

from functools import cache
from typing import Self

import torch
from torch import Tensor

from ..kernels import op_name
from .fp8 import row_scales
from .linear import QuantizedLinear, check_columns, frozen, product

LARGEST = 127
TINY = 1e-30


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The symmetric orthogonal matrix [size, size] of a power of 4, float32. Raises ValueError for another size."""
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = base
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base)
    if matrix.shape[0] != size:
        raise ValueError(f"A rotation of INT8 weights acts on groups of a power of 4 columns, not {size}.")
    return (matrix / size**0.5).to(device)


def rotated(values: Tensor, group: int) -> Tensor:
    """float32 [N, K] with every group of columns multiplied by the matrix; twice gives the same again. group 0: as is.

    Raises ValueError for a group that does not divide K.
    """
    if not group:
        return values
    if values.shape[1] % group:
        raise ValueError(f"A rotation in groups of {group} columns does not fit a weight of {values.shape[1]}.")
    return (values.unflatten(1, (-1, group)) @ hadamard(group, values.device)).flatten(1)


def int8_values(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Codes [N, K] and scales [N, 1] -> the values [N, K]."""
    # Codes are exact in every base precision, so that only the multiplication rounds.
    return rotated(codes.float() * scale, group).to(dtype) if group else codes.to(dtype).mul_(scale)


class Int8Linear(QuantizedLinear):
    """INT8 weight [N, K], scales [N, 1], bias [N]; the product is one of the activation's type. group: of `rotated`."""

    label = "INT8 weights, expanded for the product"

    def __init__(self, codes: Tensor, scale: Tensor | None, bias: Tensor | None, group: int = 0) -> None:
        super().__init__(*codes.shape, bias)
        self.group = group
        self._store(codes, row_scales(scale, codes.shape[0], codes.device))

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, group: int = 0) -> Self:
        """From a weight [N, K] in any precision."""
        return cls(*_quantized(weight, group), bias, group)

    def _store(self, codes: Tensor, scale: Tensor) -> None:
        self.weight, self.scale_weight = frozen(codes), frozen(scale)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values."""
        return int8_values(self.weight, self.scale_weight, self.group, dtype)

    def add(self, difference: Tensor) -> None:
        """The scales become new ones."""
        self._store(*_quantized(self.expanded(torch.float32) + difference, self.group))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Raises ValueError for another K."""
        check_columns(x, self.in_features)
        return _weight_only(x, self.weight, self.scale_weight, self.group, self.bias)


def _quantized(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    values = rotated(weight.float(), group)
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / LARGEST
    return (values / scale).round_().to(torch.int8), scale


@torch.library.custom_op(op_name("int8_weight_only"), mutates_args=())
def _weight_only(x: Tensor, codes: Tensor, scale: Tensor, group: int, bias: Tensor | None) -> Tensor:
    return product("int8_weight_only", x, int8_values(codes, scale, group, x.dtype), bias)


@_weight_only.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, group: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
