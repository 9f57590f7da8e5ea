"""Weights in codes of 4 or 6 bits for INT8 products (W4A8, W6A8): value = round(level * group scale) * row scale.

Storage and names are those of ComfyUI's files (`comfy_quant`: "asym_w4a8_int8"): weight int8 [N, K / 2], the even
column in the lower half of a byte, behind which 6-bit codes have their upper halves, [N, K / 4]; weight_s_rel E4M3 or
float32 [N, K / group]; weight_s_channel float32 [N]; perhaps weight_codebook float32 [16], the levels of the codes, and
weight_correction [K / group, N], which is added. Columns are rotated as those of INT8 weights. Source: comfy-kitchen
(AsymW4A8Int8Layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, Self

import comfy_kitchen
import torch
from comfy_kitchen.registry import registry
from torch import Tensor

from .int8 import runs_int8
from .linear import QuantizedLinear, frozen

GROUP, ROTATION = 16, 256
AMPERE = (8, 0)


class W4a8(NamedTuple):
    """A matrix in these codes; see above. group: columns of a group scale; rotation: columns that turn together."""

    codes: Tensor
    group_scale: Tensor
    row_scale: Tensor
    codebook: Tensor | None = None
    correction: Tensor | None = None
    group: int = GROUP
    rotation: int = ROTATION

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.group_scale.shape[1] * self.group

    @property
    def bits(self) -> int:
        return 8 * self.codes.shape[1] // self.shape[1]


class W4a8Linear(QuantizedLinear):
    """The weight, bias [N]; the product is one of the activation's type."""

    label = "W4A8 weights, expanded for the product"

    def __init__(self, weight: W4a8, bias: Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        self._store(weight)

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, group: int = GROUP, rotation: int = ROTATION) -> Self:
        """From a weight [N, K] in any precision."""
        return cls(_quantized(weight, group, rotation), bias)

    def _store(self, q: W4a8) -> None:
        self.weight, self.weight_s_rel = frozen(q.codes), frozen(q.group_scale)
        self.weight_s_channel = frozen(q.row_scale)
        self.weight_codebook = None if q.codebook is None else frozen(q.codebook)
        self.weight_correction = None if q.correction is None else frozen(q.correction)
        self.group, self.rotation = q.group, q.rotation

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self._parts if t is not None)

    @property
    def settings(self) -> tuple[int, ...]:
        return self.group, self.rotation, self.weight_codebook is not None, self.weight_correction is not None

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.weight_s_rel, self.weight_s_channel, self.weight_codebook, self.weight_correction

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        operands = _operands(stored, settings)
        # A GPU's kernel turns so many columns together, and no other number.
        with nullcontext() if operands.rotation == ROTATION else registry.use_backend("eager"):
            # In float32, so that the rotation does not round what is rounded once more.
            return comfy_kitchen.dequantize_w4a8_int8_weight(*operands, torch.float32).to(dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return W4a8MatmulLinear if runs_int8(device, AMPERE) else cls

    def add(self, difference: Tensor) -> None:
        """All scales become new ones; the codebook stays."""
        before = W4a8(*self._parts, self.group, self.rotation)
        self._store(_quantized(self.expanded(torch.float32) + difference, self.group, self.rotation, before))


class W4a8MatmulLinear(W4a8Linear):
    """The same storage, times activations in INT8 with a scale a row, through comfy-kitchen."""

    label = "W4A8 weights and INT8 products"

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        *parts, group, rotation = _operands(stored, settings)
        if x.is_cuda and rotation != ROTATION:
            return super().multiply(x, stored, settings, bias, out_features)
        return comfy_kitchen.w4a8_int8_linear(x, *parts, bias, group, rotation, x.dtype)


def _operands(stored: Sequence[Tensor], settings: Sequence[int]) -> W4a8:
    group, rotation, has_codebook, has_correction = settings
    rest = list(stored[3:])
    codebook = rest.pop(0) if has_codebook else None
    return W4a8(*stored[:3], codebook, rest.pop(0) if has_correction else None, group, rotation)


def _quantized(weight: Tensor, group: int, rotation: int, like: W4a8 | None = None) -> W4a8:
    """like: whose kind of codes and scales it shall have."""
    kept = {} if like is None else {
        "symmetric": like.correction is None, "scale_dtype": like.group_scale.dtype,
        "codebook": like.codebook is not None, "codebook_tensor": like.codebook, "bits": like.bits,
    }  # fmt: skip
    with registry.use_backend("eager"):
        codes, group_scale, row_scale, correction, codebook = comfy_kitchen.quantize_w4a8_int8_weight(
            weight.float(), group, rotation, **kept
        )
    return W4a8(codes, group_scale, row_scale, codebook, correction, group, rotation)
