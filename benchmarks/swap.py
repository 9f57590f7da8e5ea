"""Time and memory of 14B forwards whose blocks wait in main memory, beside resident ones.

    python benchmarks/swap.py [480p] [720p] [infinitetalk] [bf16] [bf16_short] [--blocks 40] [--waiting 40] ...

Random weights in the true shapes, in one process; four blocks' values are used in turn. Each case is measured resident
with all tokens at once, swapped, and resident again, so that a change of clocks shows. Prints one JSON line a case:
seconds a forward, swapped over resident, peaks of allocated memory in GiB and what the arithmetic expected, what the
copies alone would take, and whether the results are equal to the bit. All cases take about three minutes and 32 GB of
main memory; one model serves neighbouring cases of one kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from wanvideo_wrapper.attention import AttentionSpec
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan, plan_for
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.compilation import CompileArgs, compiled
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.device_copies import CudaCopies
from wanvideo_wrapper.wanvideo.memory import Work
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

GIB = 2**30
DTYPE = torch.bfloat16
DISTINCT = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table. size: (frames, height, width) of the latents; goal: GiB at the peak with all blocks waiting.

    forwards: timed in a row, behind one that is not.
    """

    size: tuple[int, int, int]
    goal: float | None = None
    fp8: bool = True
    attention: str = "cudnn_fp8"
    talking: bool = False
    forwards: int = 2

    @property
    def work(self) -> Work:
        """Its tokens."""
        return Work(math.prod(self.size) // 4)


CASES = {
    "480p": Case(size=(21, 60, 104), goal=3.2, forwards=3),
    "720p": Case(size=(21, 90, 160), goal=4.6, forwards=1),
    "infinitetalk": Case(size=(21, 96, 96), goal=4.0, talking=True, forwards=1),
    "bf16": Case(size=(21, 60, 104), fp8=False, attention="sdpa", forwards=1),
    # So few tokens that the copies take longer than the computation: the floor is the bandwidth.
    "bf16_short": Case(size=(5, 32, 32), fp8=False, attention="sdpa"),
}


def model_of(case: Case, blocks: int, device: torch.device) -> WanModel:
    """Random weights in main memory."""
    config = WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=blocks, in_dim=36 if case.talking else 16, out_dim=16
    )
    speech = MultiTalk(
        features=12 * 768, intermediate_dim=512, context_tokens=32, output_dim=768, voiced=tuple(range(blocks))
    )
    with torch.device("meta"):
        model = WanModel(config, (ImageToVideo(), ClipImageExtension(clip_dim=1280), speech) if case.talking else ())
    for name, part in model.named_children():
        if name != "blocks":
            fill(part, device)
    for index, block in enumerate(model.blocks):
        if index < DISTINCT:
            fill(block, device)
            if case.fp8:
                quantize(block)
            block.to("cpu")
        else:
            model.blocks[index] = copy.deepcopy(model.blocks[index % DISTINCT])
    for part in model.children():
        part.to("cpu")
    return model.eval().requires_grad_(False)


def fill(module: nn.Module, device: torch.device) -> None:
    """Values near 0, on the device."""
    module.to_empty(device=device).to(DTYPE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def quantize(block: nn.Module) -> None:
    """Its linear layers as the option fp8_e4m3fn_fast makes them."""
    for name, layer in list(block.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            made = Fp8MatmulLinear.quantize(layer.weight.detach(), layer.bias.detach(), torch.float8_e4m3fn)
            setattr(block.get_submodule(parent), leaf, made)


def inputs_of(case: Case, device: torch.device) -> ModelInputs:
    """Random latents, prompt, and what a talking model reads."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    payloads: tuple[Payload, ...] = ()
    if case.talking:
        payloads = (
            ImageCondition(random(1, 16, *case.size), random(1, 4, *case.size)),
            ClipImage(random(1, 257, 1280)),
            AudioWindow(random(1, 1, 81, 5, 12, 768), torch.ones((), device=device)),
        )
    return ModelInputs(
        latents=random(1, 16, *case.size, dtype=torch.float32),
        timestep=torch.tensor([500.0], device=device),
        text=(random(200, 4096),),
        payloads=payloads,
    )


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


def run(placement: Placement, model: WanModel, plan: AttentionPlan, case: Case, *, compile: bool) -> dict[str, object]:
    """One measurement with the placement's present settings, from main memory and back."""
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = inputs_of(case, device)
    placement.work, placement.attention = case.work, plan.main
    began = time.monotonic()
    placement(device)
    torch.cuda.synchronize()
    placed = time.monotonic() - began
    compiling = CompileArgs(fullgraph=True) if compile else None
    with model.attending(plan), placement.swapping(device), compiled(model.stacks().values(), compiling):
        waiting, expected = len(placement.waiting_blocks()), placement.footprint()
        with model.sparing(placement.at_once):
            seconds, peak, result = measure(lambda: model(inputs), case.forwards)
        result = result.cpu()
    placement(torch.device("cpu"))
    torch.cuda.empty_cache()
    return {
        "seconds": seconds, "peak": peak, "result": result, "waiting": waiting, "placed": placed,
        "left": torch.cuda.memory_allocated() / GIB, "expected": expected.peak(waiting) / GIB,
    }  # fmt: skip


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


def compare(name: str, model: WanModel, options: argparse.Namespace) -> dict[str, object]:
    """A row of the table."""
    case, device = CASES[name], torch.device("cuda", torch.cuda.current_device())
    plan = plan_for(case.attention, AttentionSpec(device=device, heads=40, head_dim=128, dtype=DTYPE))
    placement = Placement(model, torch.device("cpu"))
    swap = BlockSwapArgs(
        blocks_to_swap=options.waiting,
        prefetch_blocks=options.prefetch,
        embeddings=("text_embedding", "time_projection") if options.embeddings else (),
    )
    runs = []
    for setting in (None, swap, None):
        placement.swap = setting
        runs.append(run(placement, model, plan, case, compile=options.compile))
    before, swapped, after = runs
    resident = (before["seconds"] + after["seconds"]) / 2
    nbytes = sum(p.nbytes for p in model.blocks.parameters()) * swapped["waiting"] // options.blocks
    alone = copy_seconds(nbytes)
    return {
        "case": name,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "blocks": options.blocks,
        "waiting": swapped["waiting"],
        "pageable": options.pageable,
        "compile": options.compile,
        "tokens": case.work.tokens,
        "resident_seconds": [round(before["seconds"], 4), round(after["seconds"], 4)],
        "swapped_seconds": round(swapped["seconds"], 4),
        "ratio": round(swapped["seconds"] / resident, 4),
        "copies_alone_seconds": round(alone, 4),
        "over_floor": round(swapped["seconds"] / max(resident, alone), 4),
        "swapped_peak_gib": round(swapped["peak"], 3),
        "goal_gib": case.goal,
        "expected_gib": round(swapped["expected"], 3),
        "resident_peak_gib": [round(before["peak"], 3), round(before["expected"], 3)],
        "seconds_to_place": [round(r["placed"], 2) for r in runs],
        "left_gib": [round(r["left"], 4) for r in runs],
        "bit_identical": all(torch.equal(before["result"], r["result"]) for r in runs),
        "largest_difference": float((before["result"] - swapped["result"]).abs().max() / before["result"].abs().max()),
    }


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all without one")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the model")
    parser.add_argument("--waiting", type=int, default=40, help="blocks that wait; -1 chooses by free memory")
    parser.add_argument("--prefetch", type=int, default=0, help="prefetch_blocks")
    parser.add_argument("--embeddings", action="store_true", help="the embeddings wait too")
    parser.add_argument("--pageable", action="store_true", help="as where the system refuses to pin memory")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    options = parser.parse_args()
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}")
    if options.pageable:
        CudaCopies.pin = lambda self, memory: False
    device, model, kind = torch.device("cuda", torch.cuda.current_device()), None, None
    for name in options.cases or CASES:
        case = CASES[name]
        if (case.fp8, case.talking) != kind:
            # The old one goes before the new one comes.
            model, kind = None, (case.fp8, case.talking)
            model = model_of(case, options.blocks, device)
        sys.stdout.write(json.dumps(compare(name, model, options)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
