"""Self-attention of every option that runs here, at the sizes of Wan 14B: speed and error, in one run.

    python benchmarks/attention.py [--tokens 32760 48384] [--only NAME ...] [--out FILE]

40 heads of 128, bf16, random normal q, k, v. TFLOP/s count 4 * L^2 * 128 * 40 operations, also for sparse options,
whose figure is "dense-equivalent". Times are medians of whole calls, taken in turns, with quantization and copies.
A backend that takes raw projections is also timed as "NAME (fused)", less the time of norm and rope alone.

Errors are relative to float32 attention of the same inputs, over a sample of queries, for two kinds of input: normal,
and "outliers": 4 of 128 channels of q and k are 8 times larger and each head is scaled to unit RMS. Peers in the same
run: torch's default, cuDNN and flash kernels. Prints one JSON object; options that cannot run are listed with reasons.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wanvideo_wrapper import attention
from wanvideo_wrapper.attention import ATTENTION_MODES, AttentionSpec, GridAttention
from wanvideo_wrapper.kernels.norm_rope_fp8 import norm_rope
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.rope import rope_table

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
HEADS, SIZE = 40, 128
# Token grids of 832x480 and 768x768, 81 frames.
GRIDS = {32760: (21, 30, 52), 48384: (21, 48, 48)}
OUTLIERS, FACTOR = 4, 8
SAMPLE = 512

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(tokens: int, outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, L, H, D], normal; with outliers, 4 channels of q and k stand out and every head has unit RMS."""
    q, k, v = (torch.randn(1, tokens, HEADS, SIZE, device=DEVICE) for _ in range(3))
    if outliers:
        for t in (q, k):
            t[..., :: SIZE // OUTLIERS] *= FACTOR
            t /= t.square().mean(-1, keepdim=True).sqrt()
    return q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)


def exact(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of the queries `rows` in float32, head by head: [1, n, H, D]."""
    parts = []
    for head in range(HEADS):
        some, keys, values = q[0, rows, head].float(), k[0, :, head].float(), v[0, :, head].float()
        parts.append((some @ keys.T * SIZE**-0.5).softmax(-1) @ values)
    return torch.stack(parts, dim=1)[None]


def peer(kind: SDPBackend | None) -> Call:
    """torch's attention, by the named kernel."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [t.transpose(1, 2) for t in (q, k, v)]
        if kind is None:
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)

    return call


def calls_for(grid: tuple[int, int, int], only: list[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """What runs here, by name, and why the others do not."""
    spec = AttentionSpec(device=DEVICE, heads=HEADS, head_dim=SIZE, dtype=DTYPE)
    found: dict[str, Call] = {
        "peer: torch default": peer(None),
        "peer: torch cuDNN": peer(SDPBackend.CUDNN_ATTENTION),
        "peer: torch flash": peer(SDPBackend.FLASH_ATTENTION),
    }
    missing = {}
    for name in only or ATTENTION_MODES:
        why = attention.reason(name, spec)
        if why is not None:
            missing[name] = why
            continue
        backend = attention.resolve(name, spec)
        found[name] = backend.on_grid(grid) if isinstance(backend, GridAttention) else backend
    return found, missing


def working(calls: dict[str, Call], given: tuple[Tensor, Tensor, Tensor], missing: dict[str, str]) -> dict[str, Call]:
    """The calls that run on these inputs; the others' errors go to `missing`. A fault ends the run."""
    fine = {}
    for name, call in calls.items():
        try:
            call(*given)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            missing[name] = str(error).splitlines()[0]
            continue
        fine[name] = call
    return fine


def errors(calls: dict[str, Call], given: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Relative error of each call on these inputs."""
    rows = torch.randperm(given[0].shape[1], device=DEVICE)[:SAMPLE]
    want = exact(*given, rows)
    return {name: ((call(*given)[:, rows].float() - want).norm() / want.norm()).item() for name, call in calls.items()}


def fused_times(calls: dict[str, Call], tokens: int, grid: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds of raw projections to heads, less the fused norm and position that other options run before."""
    fused = {name: call for name, call in calls.items() if hasattr(call, "fused")}
    if not fused:
        return {}
    raw_q, raw_k = (torch.randn(1, tokens, HEADS * SIZE, device=DEVICE, dtype=DTYPE) for _ in range(2))
    v = torch.randn(1, tokens, HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    norms = [WanRMSNorm(HEADS * SIZE, 1e-6).to(DEVICE, DTYPE) for _ in range(2)]
    rope = rope_table(grid, SIZE, device=DEVICE)

    def placed() -> None:
        for norm, raw in zip(norms, (raw_q, raw_k), strict=True):
            norm_rope(raw, norm.weight, rope, norm.eps, HEADS)

    asked = (lambda: raw_q), (lambda: raw_k), (lambda: v)
    timed: dict[str, Callable[[], object]] = {
        f"{name} (fused)": lambda call=call: call.fused(*asked, *norms, rope) for name, call in fused.items()
    }
    found = milliseconds({**timed, "norm and rope": placed})
    alone = found.pop("norm and rope")
    return {name: time - alone for name, time in found.items()}


def measure(tokens: int, only: list[str]) -> dict[str, object]:
    """One length."""
    grid = GRIDS.get(tokens, (1, 1, tokens))
    calls, missing = calls_for(grid, only)
    normal = inputs(tokens, outliers=False)
    calls = working(calls, normal, missing)
    times = milliseconds({name: lambda call=call: call(*normal) for name, call in calls.items()})
    times |= fused_times(calls, tokens, grid)
    work = 4 * tokens**2 * SIZE * HEADS
    return {
        "tokens": tokens,
        "ms": {name: round(ms, 2) for name, ms in times.items()},
        "tflops": {name: round(work / ms / 1e9) for name, ms in times.items()},
        "speed over torch default": {name: round(times["peer: torch default"] / ms, 2) for name, ms in times.items()},
        "error": {name: round(e, 4) for name, e in errors(calls, normal).items()},
        "error with outliers": {name: round(e, 4) for name, e in errors(calls, inputs(tokens, outliers=True)).items()},
        "not run": missing,
    }


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS))
    parser.add_argument("--only", nargs="+", default=[], choices=ATTENTION_MODES)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "lengths": [measure(tokens, options.only) for tokens in options.tokens],
    }
    shown = json.dumps(result, indent=2)
    if options.out is not None:
        options.out.write_text(f"{shown}\n")
    sys.stdout.write(f"{shown}\n")


if __name__ == "__main__":
    main()
