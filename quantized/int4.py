"""Weights in INT4: value = code * scale, a float32 scale for each output row, with the columns rotated.

Storage and names are those of ComfyUI's files (`comfy_quant`: "convrot_w4a4"): weight int8 [N, K / 2], the even column
in the lower half of a byte, both signed; weight_scale [N]. The rotation is that of INT8 weights (int8.py). A file says
whether activations shall be INT4 as well or INT8. Source: comfy-kitchen (TensorCoreConvRotW4A4Layout), ConvRot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import comfy_kitchen
import torch
from torch import Tensor

from .int8 import Int8Linear, int8_product, int8_values, quantize_rows, runs_int8
from .linear import QuantizedLinear

LARGEST = 7
# The only one that comfy-kitchen takes; scales are a row's all the same.
QUANTIZATION_GROUP = 64
AMPERE = (8, 0)


def unpacked(codes: Tensor) -> Tensor:
    """Bytes int8 [N, K / 2] -> codes from -8 to 7, int8 [N, K]."""
    return torch.stack((((codes & 15) ^ 8) - 8, codes >> 4), dim=-1).flatten(1)


class Int4Linear(Int8Linear):
    """INT4 weight [N, K / 2], scales [N, 1], bias [N]; the product is one of the activation's type.

    four_bits: whether products in few bits have activations in INT4, as the file asks, or INT8.
    """

    label = "INT4 weights, expanded for the product"

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, group: int, *, four_bits: bool = True
    ) -> None:
        super().__init__(codes, scale, bias, group)
        self.in_features = 2 * codes.shape[1]
        self.four_bits = four_bits

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, group: int = 0) -> Self:
        """From a weight [N, K] in any precision."""
        return cls(*_packed(weight, group), bias, group)

    @property
    def settings(self) -> tuple[int, ...]:
        return self.group, self.four_bits

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        return int8_values(unpacked(stored[0]), stored[1], settings[0], dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return Int4MatmulLinear if runs_int8(device, AMPERE) else cls

    def add(self, difference: Tensor) -> None:
        """The scales become new ones."""
        self._store(*_packed(self.expanded(torch.float32) + difference, self.group))


class Int4MatmulLinear(Int4Linear):
    """The same storage, times activations in INT4 or INT8 with a scale a row, through comfy-kitchen."""

    label = "INT4 weights and INT4 or INT8 products"

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        (codes, scale), (group, four_bits) = stored, settings
        if four_bits:
            return comfy_kitchen.convrot_w4a4_linear(x, codes, scale.flatten(), bias, group, QUANTIZATION_GROUP)
        return int8_product(x, unpacked(codes), scale, group, bias)


def _packed(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows(weight, group, LARGEST)
    return codes[:, ::2] & 15 | codes[:, 1::2] << 4, scale
