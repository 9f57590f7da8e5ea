"""Linear layers whose weights are stored in FP8 and expanded to the activation's type for the product.

value = weight * scale_weight, with one scale per output row or one for all. A weight takes a byte a value.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TINY = 1e-12

# Parts of a layer's name that keep it in base precision: small, and sensitive.
KEEP = (
    "norm", "bias", "time_in", "patch_embedding", "time_", "img_emb", "modulation", "text_embedding", "adapter",
    "add", "ref_conv", "audio_proj", "multitalk_audio_proj", "head",
)  # fmt: skip


def quantise_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> FP8 [N, K] and float32 scales [N, 1] that map each row's largest value to the format's."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / torch.finfo(dtype).max
    return (wide / scale).to(dtype), scale


class Fp8Linear(nn.Module):
    """A linear layer with an FP8 weight [N, K], its scale ([N, 1] or 0-d, float32) and a bias in base precision."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale_weight = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def quantise(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Self:
        """From a weight in any precision, with a scale per row."""
        return cls(*quantise_rows(weight, dtype), bias)

    def add(self, difference: Tensor) -> None:
        """Change the weight by [N, K] float32; the scales become new ones, a row each."""
        weight, scale = quantise_rows(self.expanded(torch.float32) + difference, self.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale_weight = nn.Parameter(scale, requires_grad=False)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values; the product with the scale is rounded once."""
        return (self.weight.float() * self.scale_weight).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        return F.linear(x.contiguous(), self.expanded(x.dtype), self.bias)


def keeps_precision(name: str) -> bool:
    """Whether the layer of this name stays in base precision."""
    return any(part in name for part in KEEP)
