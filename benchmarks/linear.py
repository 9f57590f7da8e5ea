"""Quantized linear layers at the sizes of Wan 14B, 832x480x81, beside the original pack's form in the same run.

    python benchmarks/linear.py [--tokens 32760]

Every time is the median of a whole layer in milliseconds: quantize, product, bias. "original" clamps the activation in
place, casts it with a scale of 1 and multiplies with a scale a tensor, as the original pack does. Prints one JSON line,
with ratios original / ours (above 1 is faster) and the host's share of the layout contract.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import milliseconds
from torch import Tensor
from wanvideo_wrapper.kernels.fp8_rows import gelu_quantize, norm_quantize, quantize
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Fp8Linear, Nvfp4Linear
from wanvideo_wrapper.tensor_layout import is_kernel_ready

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
E4M3 = torch.float8_e4m3fn
SIZES = ((5120, 5120), (13824, 5120), (5120, 13824))


def original(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """The original pack's FP8 product of x [1, M, K]."""
    one, values = torch.ones((), device=DEVICE), weight.to(E4M3)

    def call() -> Tensor:
        clamped = torch.clamp(x, min=-448, max=448, out=x)
        rows = clamped.reshape(-1, x.shape[-1]).to(E4M3).contiguous()
        return torch._scaled_mm(rows, values.t(), out_dtype=DTYPE, bias=bias, scale_a=one, scale_b=one)

    return call


def linear_times(tokens: int, features: int, columns: int) -> dict[str, float]:
    """Times of one size."""
    x = torch.randn(1, tokens, columns, device=DEVICE, dtype=DTYPE)
    weight, bias = torch.randn(features, columns, device=DEVICE) * 0.02, torch.randn(features, device=DEVICE).to(DTYPE)
    plain = weight.to(DTYPE)
    fast, small = Fp8MatmulLinear.quantize(weight, bias, E4M3), Nvfp4Fp8Linear.quantize(weight, bias)
    expanded, small_expanded = Fp8Linear.quantize(weight, bias, E4M3), Nvfp4Linear.quantize(weight, bias)
    rows, copy = quantize(x), x.clone()
    return milliseconds(
        {
            "bf16": lambda: F.linear(x, plain, bias),
            "original": original(copy, weight, bias),
            "fp8 fast": lambda: fast(x),
            "fp8 fast, activation shared": lambda: fast(rows),
            "fp8": lambda: expanded(x),
            "nvfp4 by fp8": lambda: small(x),
            "nvfp4": lambda: small_expanded(x),
        }
    )


def fused_times(tokens: int) -> dict[str, float]:
    """Times of the fused kernels beside their steps."""
    x = torch.randn(1, tokens, 5120, device=DEVICE, dtype=DTYPE)
    hidden = torch.randn(1, tokens, 13824, device=DEVICE, dtype=DTYPE)
    gain, shift = (torch.rand(1, 1, 5120, device=DEVICE) for _ in range(2))

    def modulated() -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x.float(), (5120,), eps=1e-6), gain).to(DTYPE)

    return milliseconds(
        {
            "quantize": lambda: quantize(x),
            "norm, modulate": modulated,
            "norm, modulate, quantize": lambda: norm_quantize(x, gain, shift, 1e-6),
            "gelu": lambda: F.gelu(hidden, approximate="tanh"),
            "gelu, quantize": lambda: gelu_quantize(hidden),
        }
    )


def contract_microseconds() -> float:
    """What the layout rule costs the host for the five arguments of a product."""
    arguments = [torch.empty(64, 64, device=DEVICE) for _ in range(5)]
    start = time.perf_counter()
    for _ in range(1000):
        for t in arguments:
            is_kernel_ready(t, strided=False)
    return (time.perf_counter() - start) * 1000


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32760)
    options = parser.parse_args()
    linear = {f"N={n} K={k}": linear_times(options.tokens, n, k) for n, k in SIZES}
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": options.tokens,
        "linear_ms": {size: {k: round(v, 3) for k, v in times.items()} for size, times in linear.items()},
        "fused_ms": {k: round(v, 3) for k, v in fused_times(options.tokens).items()},
        "ratio": {size: round(times["original"] / times["fp8 fast"], 3) for size, times in linear.items()},
        "contract_us_per_product": round(contract_microseconds(), 2),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
