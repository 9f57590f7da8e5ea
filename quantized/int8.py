"""Weights in INT8: value = code * scale, a float32 scale for each output row, and perhaps a rotation of the columns.

Storage and names are those of ComfyUI's files (`comfy_quant`: "int8_tensorwise"), of one scale or one a row. With
`convrot`, groups of columns were multiplied by a Hadamard matrix before they were rounded, which spreads outliers; the
matrix is its own inverse. Source: comfy-kitchen (TensorWiseINT8Layout), ConvRot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

import comfy_kitchen
import torch
from torch import Tensor

from .fp8 import row_scales
from .linear import QuantizedLinear, frozen

LARGEST = 127
TINY = 1e-30
TURING = (7, 5)


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
        return cls(*quantize_rows(weight, group), bias, group)

    def _store(self, codes: Tensor, scale: Tensor) -> None:
        self.weight, self.scale_weight = frozen(codes), frozen(scale)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.weight, self.scale_weight

    @property
    def settings(self) -> tuple[int, ...]:
        return (self.group,)

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        return int8_values(*stored, *settings, dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return Int8MatmulLinear if runs_int8(device) else cls

    def add(self, difference: Tensor) -> None:
        """The scales become new ones."""
        self._store(*quantize_rows(self.expanded(torch.float32) + difference, self.group))


class Int8MatmulLinear(Int8Linear):
    """The same storage, times activations in INT8 with a scale a row (W8A8), through comfy-kitchen."""

    label = "INT8 weights and INT8 products"

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        return int8_product(x, *stored, *settings, bias)


def int8_product(x: Tensor, codes: Tensor, scale: Tensor, group: int, bias: Tensor | None) -> Tensor:
    """x [M, K], measured row by row, times codes [N, K] with scales a row, in INT8: [M, N]. group: of `rotated`."""
    return comfy_kitchen.int8_linear(x, codes, scale, bias, x.dtype, convrot=group > 0, convrot_groupsize=group or 1)


def runs_int8(device: torch.device, least: tuple[int, int] = TURING) -> bool:
    """Whether comfy-kitchen multiplies in INT8 on the device; on a CPU it does, slowly."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= least)


def quantize_rows(weight: Tensor, group: int, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    """Weight [N, K], rotated -> whole numbers up to `largest`, int8 [N, K], and scales [N, 1]."""
    values = rotated(weight.float(), group)
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / largest
    return (values / scale).round_().to(torch.int8), scale
