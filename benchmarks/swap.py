"""Time and memory of a Wan 2.1 14B text-to-video forward whose blocks wait in main memory, beside a resident one.

    python benchmarks/swap.py [--blocks 40] [--waiting 40] [--storage fp8] [--attention cudnn_fp8] [--frames 21]

Random weights in the true shapes, in one process: resident, swapped, resident again, so that a change of clocks shows.
Prints one JSON line: seconds a forward, swapped over resident, peaks of allocated memory in GiB, what the copies alone
would take, and whether the results are equal to the bit. Weights need 14 GB of main memory in FP8, 28 GB in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from wanvideo_wrapper.attention import AttentionSpec
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan, plan_for
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.compilation import CompileArgs, compiled
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.device_copies import CudaCopies
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

GIB = 2**30
DTYPE = torch.bfloat16


def model_of(options: argparse.Namespace, device: torch.device) -> WanModel:
    """Random weights; each block goes to main memory as soon as it is made."""
    config = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=options.blocks)
    with torch.device("meta"):
        model = WanModel(config)
    for part in model.children():
        for module in part if isinstance(part, nn.ModuleList) else (part,):
            module.to_empty(device=device).to(DTYPE)
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)
            if isinstance(part, nn.ModuleList) and options.storage != "bf16":
                quantize(module, options.storage)
            module.to("cpu")
    return model.eval().requires_grad_(False)


def quantize(block: nn.Module, storage: str) -> None:
    """Its linear layers as the options fp8_e4m3fn_fast and fp4_experimental make them."""
    for name, layer in list(block.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if storage == "fp8":
            made = Fp8MatmulLinear.quantize(weight, bias, torch.float8_e4m3fn)
        else:
            made = Nvfp4Linear.quantize(weight, bias)
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, made)


def measure(forward: Callable[[], Tensor], forwards: int) -> tuple[float, float, Tensor]:
    """Seconds a forward, in a row as a sampler runs them, the peak of allocated GiB, and the result."""
    forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(forwards):
        result = forward()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / forwards, torch.cuda.max_memory_allocated() / GIB, result


def run(placement: Placement, model: WanModel, plan: AttentionPlan, options: argparse.Namespace) -> dict[str, object]:
    """One measurement with the placement's present settings, from main memory and back."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(1, 16, options.frames, *options.size, device=device, generator=generator)
    text = torch.randn(200, 4096, device=device, dtype=DTYPE, generator=generator)
    inputs = ModelInputs(latents=latents, timestep=torch.tensor([500.0], device=device), text=(text,))
    began = time.monotonic()
    placement(device)
    torch.cuda.synchronize()
    placed = time.monotonic() - began
    compiling = CompileArgs(fullgraph=True) if options.compile else None
    with model.attending(plan), placement.swapping(device), compiled(model.stacks().values(), compiling):
        seconds, peak, result = measure(lambda: model(inputs), options.forwards)
        result, waiting = result.cpu(), len(placement.waiting_blocks())
    placement(torch.device("cpu"))
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated() / GIB
    return {"seconds": seconds, "peak": peak, "result": result, "waiting": waiting, "placed": placed, "left": left}


def copy_seconds(nbytes: int) -> float:
    """How long copies of that many bytes from pinned memory take with nothing beside them."""
    source = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):
        event.record()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
    end.synchronize()
    return start.elapsed_time(end) / 1000 * nbytes / (8 * source.nbytes)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the model")
    parser.add_argument("--waiting", type=int, default=40, help="blocks that wait; -1 chooses by free memory")
    parser.add_argument("--prefetch", type=int, default=0, help="prefetch_blocks")
    parser.add_argument("--storage", choices=("fp8", "nvfp4", "bf16"), default="fp8")
    parser.add_argument("--attention", default="sdpa", help="attention_mode")
    parser.add_argument("--frames", type=int, default=21, help="latent frames; 21 are 81 pixel frames")
    parser.add_argument("--size", type=int, nargs=2, default=(60, 104), help="latent height and width: 60 104 is 480p")
    parser.add_argument("--forwards", type=int, default=4, help="forwards in a row that are timed")
    parser.add_argument("--embeddings", action="store_true", help="the text embedding waits too")
    parser.add_argument("--pageable", action="store_true", help="as where the system refuses to pin memory")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    options = parser.parse_args()
    if options.pageable:
        CudaCopies.pin = lambda self, memory: False
    device = torch.device("cuda", torch.cuda.current_device())
    model = model_of(options, device)
    spec = AttentionSpec(device=device, heads=40, head_dim=128, dtype=DTYPE)
    plan, placement = plan_for(options.attention, spec), Placement(model, torch.device("cpu"))
    swap = BlockSwapArgs(
        blocks_to_swap=options.waiting,
        prefetch_blocks=options.prefetch,
        embeddings=("text_embedding",) if options.embeddings else (),
    )
    runs = []
    for setting in (None, swap, None):
        placement.swap = setting
        runs.append(run(placement, model, plan, options))
    before, swapped, after = runs
    resident = (before["seconds"] + after["seconds"]) / 2
    nbytes = sum(p.nbytes for block in model.blocks for p in block.parameters()) * swapped["waiting"] // options.blocks
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("blocks", "storage", "attention", "prefetch", "compile")},
        "waiting": swapped["waiting"],
        "pageable": options.pageable,
        "tokens": options.frames * options.size[0] * options.size[1] // 4,
        "resident_seconds": [round(before["seconds"], 4), round(after["seconds"], 4)],
        "swapped_seconds": round(swapped["seconds"], 4),
        "ratio": round(swapped["seconds"] / resident, 4),
        "copies_alone_seconds": round(copy_seconds(nbytes), 4),
        "resident_peak_gib": round(before["peak"], 3),
        "swapped_peak_gib": round(swapped["peak"], 3),
        "seconds_to_place": [round(r["placed"], 2) for r in runs],
        "left_gib": [round(r["left"], 4) for r in runs],
        "bit_identical": all(torch.equal(before["result"], r["result"]) for r in runs),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
