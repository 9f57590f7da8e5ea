"""The linear layers of a block by quantization, beside the original pack's form in the same run.

A time is of a whole layer: quantize, product, bias. "original pack, FP8" clamps the activation in place, casts it with
a scale of 1 and multiplies with a scale a tensor, as the original does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import Host
from ..quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from ..quantized.nvfp4 import Nvfp4Fp8Linear, Nvfp4Linear
from .clock import milliseconds
from .random_model import DTYPE, Case
from .report import Row

E4M3 = torch.float8_e4m3fn


@torch.no_grad()
def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """A row an option, a column a layer of the model (output x input channels)."""
    wide, inner = case.config.dim, case.config.ffn_dim
    sizes = ((wide, wide), (inner, wide), (wide, inner))
    times = {f"ms {n}x{k}": _times(case.tokens, n, k, host.device()) for n, k in sizes}
    names = next(iter(times.values()))
    return [Row(name, {size: each[name] for size, each in times.items()}) for name in names]


def _times(tokens: int, features: int, columns: int, device: torch.device) -> dict[str, float]:
    x = torch.randn(1, tokens, columns, device=device, dtype=DTYPE)
    weight = torch.randn(features, columns, device=device) * 0.02
    bias = torch.randn(features, device=device).to(DTYPE)
    plain = weight.to(DTYPE)
    fast, small = Fp8MatmulLinear.quantize(weight, bias, E4M3), Nvfp4Fp8Linear.quantize(weight, bias)
    expanded, small_expanded = Fp8Linear.quantize(weight, bias, E4M3), Nvfp4Linear.quantize(weight, bias)
    calls: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: F.linear(x, plain, bias),
        "fp8, fast": lambda: fast(x),
        "fp8, expanded": lambda: expanded(x),
        "fp4, by FP8 products": lambda: small(x),
        "fp4, expanded": lambda: small_expanded(x),
    }
    if device.type == "cuda":
        from ..kernels.fp8_rows import quantize

        rows, copy = quantize(x), x.clone()
        calls["fp8, fast, activation shared"] = lambda: fast(rows)
        calls["original pack, FP8"] = _original(copy, weight, bias)
    return milliseconds(calls, device)


def _original(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    one, values = torch.ones((), device=x.device), weight.to(E4M3)

    def call() -> Tensor:
        clamped = torch.clamp(x, min=-448, max=448, out=x)
        rows = clamped.reshape(-1, x.shape[-1]).to(E4M3).contiguous()
        return torch._scaled_mm(rows, values.t(), out_dtype=DTYPE, bias=bias, scale_a=one, scale_b=one)

    return call
