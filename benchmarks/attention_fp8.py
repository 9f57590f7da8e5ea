"""FP8 attention by cuDNN at the sizes of Wan 14B (40 heads of 128) beside bfloat16 SDPA in the same run.

    python benchmarks/attention_fp8.py [--tokens 32760 48384]

Times are medians in milliseconds. "prepare" is everything around the kernel: mean of sampled keys; norm, position,
rotation and rounding of q and k; rounding of v; expanding of the result (which an FP8 output projection does without).
The bytes of q and k are 2 read and 1 written each; `floor` is a device copy that moves as many in the same run. "added"
is what "prepare" takes beyond the fused norm and position in bfloat16 that it replaces, and the rate counts kernel and
"added". Errors are relative, against float32 over some of the queries. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from wanvideo_wrapper.attention import AttentionSpec, resolve
from wanvideo_wrapper.attention_backends import cudnn as attention_cudnn
from wanvideo_wrapper.bench.clock import milliseconds
from wanvideo_wrapper.kernels import norm_rope_fp8 as ops
from wanvideo_wrapper.kernels.rope import apply_rope
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.rope import rope_table

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
HEADS, SIZE = 40, 128
SPEC = AttentionSpec(device=DEVICE, heads=HEADS, head_dim=SIZE, dtype=DTYPE)
CHANNELS = HEADS * SIZE
GRIDS = {32760: (21, 30, 52), 48384: (21, 48, 48), 75600: (21, 45, 80)}
QUERIES = 1024


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, WanRMSNorm, Tensor]:
    """Raw q, k [1, L, C], v [1, L, H, D], a norm and the positions."""
    q, k, v = (torch.randn(1, tokens, CHANNELS, device=DEVICE, dtype=DTYPE) for _ in range(3))
    norm = WanRMSNorm(CHANNELS, 1e-6).to(DEVICE, DTYPE)
    norm.weight.data.uniform_(0.5, 1.5)
    return q, k, v.unflatten(-1, (HEADS, SIZE)), norm, rope_table(GRIDS[tokens], SIZE, device=DEVICE)


def times(tokens: int) -> dict[str, float]:
    """Times of the parts and of the whole."""
    q, k, v, norm, rope = inputs(tokens)
    backend, sdpa = (resolve(name, SPEC) for name in ("cudnn_fp8", "sdpa"))
    quantized = ops.norm_rope_fp8(q, norm.weight, rope, None, norm.eps, HEADS)
    values = ops.tensor_fp8(v)
    asked = (lambda: q), (lambda: k), (lambda: v)
    placed = apply_rope(norm(q).unflatten(-1, (HEADS, SIZE)), rope)
    mean = ops.norm_rope_mean(k, norm.weight, rope, norm.eps, HEADS)
    # 3 bytes an element of q and k: half of them read, half written.
    copied = torch.randint(256, (3 * tokens * CHANNELS,), device=DEVICE, dtype=torch.uint8)
    copy = torch.empty_like(copied)

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(apply_rope(norm(t).unflatten(-1, (HEADS, SIZE)), rope) for t in (x, y))

    def norm_rope() -> None:
        for t in (q, k):
            ops.norm_rope(t, norm.weight, rope, norm.eps, HEADS)

    def norm_rope_quantize() -> None:
        ops.norm_rope_fp8(q, norm.weight, rope, None, norm.eps, HEADS)
        ops.norm_rope_fp8(k, norm.weight, rope, mean, norm.eps, HEADS)

    compiled = torch.compile(both)
    # Apart from attention, which heats the card: what followed it would run at lower clocks than the copy's.
    short = milliseconds(
        {
            "mean of keys": lambda: ops.norm_rope_mean(k, norm.weight, rope, norm.eps, HEADS),
            "norm, rope, quantize q and k": norm_rope_quantize,
            "norm, rope of q and k in bf16": norm_rope,
            "the same in PyTorch": lambda: both(q, k),
            "the same in PyTorch, compiled": lambda: compiled(q, k),
            "quantize v": lambda: ops.tensor_fp8(v),
            "expand o": lambda: ops.expand_fp8(values[0], values[1], DTYPE),
            "copy of as many bytes": lambda: copy.copy_(copied),
        },
        DEVICE,
    )
    return short | milliseconds(
        {
            "norm, rope, quantize behind attention": norm_rope_quantize,
            "kernel": lambda: attention_cudnn._attention(quantized, quantized, values),
            "cudnn_fp8, fused": lambda: backend.fused(*asked, norm, norm, rope),
            "cudnn_fp8, fused, rows": lambda: backend.fused_rows(*asked, norm, norm, rope),
            "cudnn_fp8, from placed q and k": lambda: backend(placed, placed, v),
            "sdpa bf16": lambda: sdpa(placed, placed, v),
        },
        DEVICE,
    )


def rates(tokens: int, found: dict[str, float]) -> dict[str, float]:
    """What is compared: ratios to the time of the bytes, and TFLOP/s."""
    operations = 4 * tokens**2 * CHANNELS
    floor = found["copy of as many bytes"]
    prepare = sum(found[name] for name in ("mean of keys", "norm, rope, quantize q and k", "quantize v", "expand o"))
    added = max(prepare - found["norm, rope of q and k in bf16"], 0)

    def tera(milliseconds: float) -> float:
        return operations / milliseconds * 1e-9

    return {
        "floor_ms": floor,
        "over_floor": found["norm, rope, quantize q and k"] / floor,
        "over_4.3_TB_per_s": found["norm, rope, quantize q and k"] / (6 * tokens * CHANNELS / 4.3e9),
        "over_replaced": found["norm, rope, quantize q and k"] / found["norm, rope of q and k in bf16"],
        "copy_TB_per_s": 6 * tokens * CHANNELS / floor * 1e-9,
        "added_ms": added,
        "cudnn_fp8_TFLOPs": tera(found["kernel"] + added),
        "kernel_TFLOPs": tera(found["kernel"]),
        "fused_whole_TFLOPs": tera(found["cudnn_fp8, fused"]),
        "sdpa_bf16_TFLOPs": tera(found["sdpa bf16"]),
        "faster_than_sdpa": found["sdpa bf16"] / (found["kernel"] + added),
    }


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, a head at a time."""
    heads = [
        F.softmax(q[:, :, h].float() @ k[:, :, h].float().mT * SIZE**-0.5, -1) @ v[:, :, h].float()
        for h in range(q.shape[2])
    ]
    return torch.stack(heads, dim=2)


def unrotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same kernel on q, k rounded as they are."""
    values, scale = attention_cudnn._attention(ops.tensor_fp8(q), ops.tensor_fp8(k), ops.tensor_fp8(v))
    return ops.expand_fp8(values, scale, DTYPE)


def errors(tokens: int) -> dict[str, float]:
    """Relative errors on normal numbers and with 4 of 128 channels of q and k 8 times larger, heads at unit RMS."""
    q, k, v = (torch.randn(1, tokens, HEADS, SIZE, device=DEVICE, dtype=DTYPE) for _ in range(3))
    backend, some = resolve("cudnn_fp8", SPEC), torch.randperm(tokens, device=DEVICE)[:QUERIES]
    found = {}
    for case in ("normal", "outliers"):
        if case == "outliers":
            channels = torch.randperm(SIZE, device=DEVICE)[:4]
            for t in (q, k):
                t[..., channels] *= 8
                t /= t.float().square().mean(-1, keepdim=True).sqrt().to(DTYPE)
        want = exact(q[:, some], k, v)
        for name, function in (("", backend), (", unrotated", unrotated)):
            got = function(q, k, v)[:, some].float()
            found[case + name] = ((got - want).norm() / want.norm()).item()
    return found


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 48384], choices=GRIDS)
    options = parser.parse_args()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for tokens in options.tokens:
        found = times(tokens)
        parts = {"ms": found, "compared": rates(tokens, found), "relative_error": errors(tokens)}
        rounded = {name: {k: round(v, 4) for k, v in part.items()} for name, part in parts.items()}
        result[f"L={tokens}"] = rounded
        for name, part in rounded.items():
            sys.stdout.write(f"\nL = {tokens}: {name}\n")
            sys.stdout.writelines(f"  {key:<42}{value:>12.4f}\n" for key, value in part.items())
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
