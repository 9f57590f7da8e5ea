"""Weights in MXFP8: value = E4M3 code * E8M0 scale of its 32 columns, a power of two.

Storage and names are those of ComfyUI's files (`comfy_quant`: "mxfp8"): weight E4M3 [P, Q], weight_scale in cuBLAS'
order of 128 x 4 tiles. P, Q: N and K rounded up with zeros to 32. Source: comfy-kitchen (TensorCoreMXFP8Layout), OCP
Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen.registry import registry
from torch import Tensor

from ..kernels.fp8_rows import padded_size
from ..tensor_layout import kernel_ready
from .linear import BLACKWELL, QuantizedLinear, frozen, padded

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
        self.weight = frozen(padded(codes, padded_size(codes.shape[0], BLOCK), codes.shape[1]))
        self.weight_scale = frozen(block_scale.view(torch.uint8))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.weight, self.weight_scale

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        return mxfp8_values(*stored, dtype)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        return Mxfp8MatmulLinear if runs_mxfp8(device) else cls

    def add(self, difference: Tensor) -> None:
        """All scales become new ones."""
        self._store(*_quantized(self.expanded(torch.float32) + difference))


class Mxfp8MatmulLinear(Mxfp8Linear):
    """MXFP8 weight and activations, on Blackwell tensor cores through comfy-kitchen; elsewhere what they compute."""

    label = "MXFP8 weights and MXFP8 products"

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        if bias is not None:
            bias = F.pad(bias, (0, stored[0].shape[0] - out_features)).to(
                torch.bfloat16 if runs_mxfp8(x.device) else torch.float32
            )
        rows, scale = comfy_kitchen.quantize_mxfp8(x, pad_32x=True)
        if runs_mxfp8(x.device):
            weight_scale = stored[1].view(torch.float8_e8m0fnu)
            product = comfy_kitchen.scaled_mm_mxfp8(rows, stored[0], scale, weight_scale, bias, torch.bfloat16)
        else:
            product = F.linear(*(mxfp8_values(*q, torch.float32) for q in ((rows, scale), stored)), bias)
        return product[: x.shape[0], :out_features].to(x.dtype).contiguous()


def runs_mxfp8(device: torch.device) -> bool:
    """Whether the device has MXFP8 tensor cores (Blackwell)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BLACKWELL


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (-size % BLOCK for size in weight.shape)
    full = kernel_ready(F.pad(weight.float(), (0, columns, 0, rows)), strided=False)
    with registry.use_backend("eager"):
        return comfy_kitchen.quantize_mxfp8(full)
