"""Weights in GGUF blocks (Q4_K, IQ4_XS, ...): compressed in memory, expanded on their device at each use.

Blocks become float32 values, which are rounded once to the activation's type. No type is larger than Q8_0's 34 bytes
for 32 values, and a weight of any type is one matrix of bytes [N, bytes of a row].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tensor_layout import kernel_ready
from .gguf_blocks import PLAIN
from .gguf_grids import GRIDS
from .linear import QuantizedLinear, frozen

TYPES = PLAIN | GRIDS
_NAMES = tuple(TYPES)
# Values that are expanded at a time: what float32 and codes need in between stays a few hundred megabytes.
MOST_VALUES = 2**24


def block_size(form: str) -> tuple[int, int]:
    """Values and bytes of a block of the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[form]]


def dequantize(rows: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """Rows of blocks, bytes [N, bytes of a row] -> their values [N, K] in `dtype`, on the same device."""
    values, size = block_size(form)
    # float16 scales are read in place, which bytes at an odd address do not allow.
    blocks = kernel_ready(rows, strided=False).view(torch.uint8).reshape(-1, size)
    out = torch.empty(blocks.shape[0], values, dtype=dtype, device=rows.device)
    step = MOST_VALUES // values
    for target, source in zip(out.split(step), blocks.split(step), strict=True):
        target.copy_(TYPES[form](source))
    return out.view(rows.shape[0], rows.shape[1] // size * values)


class GgufLinear(QuantizedLinear):
    """GGUF weight, bias [N]; the product is one of the activation's type. form: the type's name, e.g. "Q4_K"."""

    label = "GGUF weights, expanded for the product"

    def __init__(self, rows: Tensor, form: str, bias: Tensor | None) -> None:
        values, size = block_size(form)
        super().__init__(rows.shape[0], rows.shape[1] // size * values, bias)
        self.form = form
        # int8 for bytes: transformers casts activations to the type of a T5 layer's weight unless that is int8.
        self.weight = frozen(rows.view(torch.int8))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    @property
    def settings(self) -> tuple[int, ...]:
        return (_NAMES.index(self.form),)

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        return dequantize(stored[0], _NAMES[settings[0]], dtype)

    def add(self, difference: Tensor) -> None:
        """The weight becomes bfloat16, whose rounding is below that of every type of blocks."""
        changed = (self.expanded(torch.float32) + difference).bfloat16()
        self.form, self.weight = "BF16", frozen(changed.view(torch.int8))
        self.label = "GGUF weights with a merged LoRA, kept in bfloat16 (merge_loras off keeps them compressed)"


class GgufEmbedding(nn.Module):
    """A table of GGUF rows of which only those that are asked for are expanded. dtype: of the result."""

    def __init__(self, rows: Tensor, form: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        self.weight = frozen(rows.view(torch.int8))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., K]."""
        return dequantize(self.weight[ids.flatten()], self.form, self.dtype).view(*ids.shape, -1)
