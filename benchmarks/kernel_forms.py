"""Forms of the fused kernels at the sizes of Wan 14B (40 heads of 128), beside a device copy in the same run.

    python benchmarks/kernel_forms.py [--tokens 32760] [--only norm_rope_fp8]

A form is a set of constants of a kernel's module; the first of each list is the default. Each is compared with eager
PyTorch first: `differ` is the share of values that are not equal. Times are medians in milliseconds; `over_copy` is
relative to a copy that moves as many bytes. norm_rope_fp8 is timed for q and k together; rms_norm, rope_heads and
gated_residual beside the eager form in whose place they are. Prints one JSON line a kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from wanvideo_wrapper.bench.clock import milliseconds
from wanvideo_wrapper.kernels import fp8_rows, triton_kernels
from wanvideo_wrapper.kernels import norm_rope_fp8 as rotation
from wanvideo_wrapper.kernels.gated_residual import gated_residual, gated_residual_eager
from wanvideo_wrapper.kernels.modulated_norm import rms_norm, rms_norm_eager
from wanvideo_wrapper.kernels.rope import apply_rope
from wanvideo_wrapper.wanvideo.modules.layers import WIDE_TOKENS
from wanvideo_wrapper.wanvideo.modules.stretches import parts_of, stretched
from wanvideo_wrapper.wanvideo.rope import rope_table

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
HEADS, SIZE, HIDDEN, EPS = 40, 128, 13824, 1e-6
CHANNELS = HEADS * SIZE
GRIDS = {32760: (21, 30, 52), 48384: (21, 48, 48)}
FEW = 777

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel's constants and their forms; what runs it and its eager oracle, for so many tokens; bytes a token.

    replaces: whether the eager form is what ran before there was the kernel, and so is timed, too.
    """

    module: str
    constants: tuple[str, ...]
    forms: tuple[tuple[int | None, ...], ...]
    calls: Callable[[int], tuple[Callable[[], Result], Callable[[], Result]]]
    bytes_a_token: int
    replaces: bool = False


def placed(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    """q without and k with a shift."""
    q, k = (torch.randn(1, tokens, CHANNELS, device=DEVICE, dtype=DTYPE) * 3 for _ in range(2))
    weight = (torch.rand(CHANNELS, device=DEVICE) + 0.5).to(DTYPE)
    rope = rope_table(GRIDS.get(tokens, (1, 1, tokens)), SIZE, device=DEVICE)
    shift = torch.randn(1, CHANNELS, device=DEVICE)

    def both(function: Callable[..., Result]) -> Result:
        pairs = (function(t, weight, rope, s, EPS, HEADS) for t, s in ((q, None), (k, shift)))
        return tuple(torch.stack(side) for side in zip(*pairs, strict=True))

    def run() -> None:
        rotation.norm_rope_fp8(q, weight, rope, None, EPS, HEADS)
        rotation.norm_rope_fp8(k, weight, rope, shift, EPS, HEADS)

    if tokens == FEW:
        return lambda: both(rotation.norm_rope_fp8), lambda: both(rotation.norm_rope_fp8_eager)
    return run, run


def rows(columns: int, fused: Callable[[Tensor], fp8_rows.Fp8Rows], eager: Callable[[Tensor], Result]) -> Callable:
    """Rows of so many columns."""

    def calls(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
        x = torch.randn(1, tokens, columns, device=DEVICE, dtype=DTYPE) * 3
        return lambda: fused(x)[:2], lambda: eager(x)

    return calls


def normed(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    """Rows behind a norm with one modulation for all."""
    x = torch.randn(1, tokens, CHANNELS, device=DEVICE, dtype=DTYPE)
    gain, shift = torch.rand(1, 1, CHANNELS, device=DEVICE) + 0.5, torch.randn(1, 1, CHANNELS, device=DEVICE)
    return (
        lambda: fp8_rows.norm_quantize(x, gain, shift, EPS)[:2],
        lambda: fp8_rows.norm_quantize_eager(x, gain, shift, EPS),
    )


def rms_normed(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    """The queries of cross-attention, and how they were normalized: some tokens at a time in float32."""
    x = torch.randn(1, tokens, CHANNELS, device=DEVICE, dtype=DTYPE) * 3
    weight = (torch.rand(CHANNELS, device=DEVICE) + 0.5).to(DTYPE)

    def eager() -> Result:
        parts = parts_of(tokens, WIDE_TOKENS)
        return (stretched(lambda part: rms_norm_eager(x[:, part], weight, EPS), tokens, parts),)

    return lambda: (rms_norm(x, weight, EPS),), eager


def turned(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    """The queries of speech at the positions of their speakers."""
    x = torch.randn(1, tokens, HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    rope = rope_table((1, 1, tokens), SIZE, device=DEVICE)
    return lambda: (rotation.rope_heads(x, rope),), lambda: (apply_rope(x, rope),)


def added(tokens: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    """What self-attention or the feed-forward adds to the residual stream, and PyTorch's addcmul."""
    x, y = (torch.randn(1, tokens, CHANNELS, device=DEVICE, dtype=DTYPE) for _ in range(2))
    gate = torch.randn(1, 1, CHANNELS, device=DEVICE)
    return lambda: (gated_residual(x, y, gate),), lambda: (gated_residual_eager(x, y, gate),)


QUANTIZE = ("fp8_rows_triton", ("WARP_COLUMNS", "MOST_PIECES"), ((256, 7), (256, 10), (256, 20), (128, 5), (512, 3)))
KERNELS = {
    "norm_rope_fp8": Kernel(
        "norm_rope_fp8_triton",
        ("LANES", "WARPS", "REGISTERS"),
        ((8, 2, 64), (8, 2, None), (8, 2, 80), (8, 4, 64), (8, 1, 64), (4, 2, 96)),
        placed,
        6 * CHANNELS,
    ),
    "quantize": Kernel(*QUANTIZE, rows(CHANNELS, fp8_rows.quantize, fp8_rows.quantize_eager), 3 * CHANNELS),
    "gelu_quantize": Kernel(*QUANTIZE, rows(HIDDEN, fp8_rows.gelu_quantize, fp8_rows.gelu_quantize_eager), 3 * HIDDEN),
    "norm_quantize": Kernel(
        "fp8_rows_triton",
        ("NORM_WARP_COLUMNS", "NORM_MOST_PIECES", "SHARED_ROWS"),
        ((256, 5, 8), (256, 5, 16), (256, 5, 32), (128, 5, 8), (128, 5, 16), (256, 3, 16)),
        normed,
        3 * CHANNELS,
    ),
    "rms_norm": Kernel(
        "fp8_rows_triton",
        ("NORM_WARP_COLUMNS", "NORM_MOST_PIECES", "SHARED_ROWS"),
        ((256, 5, 8), (256, 5, 16), (256, 3, 8), (128, 5, 8), (512, 5, 8)),
        rms_normed,
        4 * CHANNELS,
        replaces=True,
    ),
    "rope_heads": Kernel(
        "norm_rope_fp8_triton", ("MOST_HEADS", "ROW_WARPS"), ((8, 4), (8, 8), (4, 4), (8, 2)), turned, 4 * CHANNELS,
        replaces=True,
    ),
    "gated_residual": Kernel(
        "gated_residual_triton", ("PART", "WARPS"), ((1024, 4), (2048, 4), (2048, 8), (512, 2)), added, 6 * CHANNELS,
        replaces=True,
    ),
}  # fmt: skip


@contextmanager
def chosen(module: ModuleType, constants: tuple[str, ...], form: tuple[int | None, ...]) -> Iterator[None]:
    """Inside, the kernel has this form."""
    before = [getattr(module, name) for name in constants]
    try:
        for name, value in zip(constants, form, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for name, value in zip(constants, before, strict=True):
            setattr(module, name, value)


def measure(kernel: Kernel, tokens: int) -> dict[str, dict[str, float]]:
    """Every form's share of differing values and time."""
    module = triton_kernels(kernel.module)
    (few, eager), (many, before) = kernel.calls(FEW), kernel.calls(tokens)
    source = torch.randint(256, (kernel.bytes_a_token * tokens // 2,), device=DEVICE, dtype=torch.uint8)
    target, want = torch.empty_like(source), eager()[0].float()
    differ, calls = {}, {"copy": lambda: target.copy_(source)} | ({"eager": before} if kernel.replaces else {})
    for form in kernel.forms:

        def call(form: tuple[int | None, ...] = form, function: Callable[[], object] = many) -> object:
            with chosen(module, kernel.constants, form):
                return function()

        name = ", ".join(f"{constant} {value}" for constant, value in zip(kernel.constants, form, strict=True))
        differ[name] = (call(function=few)[0].float() != want).float().mean().item()
        calls[name] = call
    times = milliseconds(calls, DEVICE)
    return {
        name: {"ms": round(ms, 4), "over_copy": round(ms / times["copy"], 3), "differ": differ.get(name, 0.0)}
        for name, ms in times.items()
    }


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760, choices=GRIDS)
    parser.add_argument("--only", nargs="+", default=list(KERNELS), choices=KERNELS)
    options = parser.parse_args()
    for name in options.only:
        found = {
            "kernel": name,
            "device": torch.cuda.get_device_name(),
            "forms": measure(KERNELS[name], options.tokens),
        }
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
