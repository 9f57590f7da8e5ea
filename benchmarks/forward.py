"""Time of one Wan 2.1 14B text-to-video forward at 832x480, 81 frames, next to diffusers in the same run.

    python benchmarks/forward.py [--frames 21] [--compile] [--fp8]

Per-block time is the difference of a 3-block and a 1-block model, so that 14B fits anywhere; a forward is 40 of them.
Prints one JSON line: milliseconds per block, seconds per 40-block forward, and ratios (peer / ours, above 1 is faster).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from wanvideo_wrapper.fp8_optimization import keeps_precision
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

LAYERS = 40
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights on the device."""
    model = model.to_empty(device=DEVICE).to(DTYPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def in_fp8(model: WanModel) -> None:
    """Its linear layers as the option fp8_e4m3fn_fast makes them."""
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name.startswith("blocks.") and not keeps_precision(name):
            parent, _, leaf = name.rpartition(".")
            quantized = Fp8MatmulLinear.quantize(layer.weight.detach(), layer.bias.detach(), torch.float8_e4m3fn)
            setattr(model.get_submodule(parent), leaf, quantized)


def ours(layers: int, latents: torch.Tensor, text: torch.Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """A forward of this project's model."""
    config = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=layers)
    with torch.device("meta"):
        model = WanModel(config)
    model = randomise(model)
    if options.fp8:
        in_fp8(model)
    if options.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    inputs = ModelInputs(latents=latents, timestep=torch.tensor([500.0], device=DEVICE), text=(text,))
    return lambda: model(inputs)


def diffusers(
    layers: int, latents: torch.Tensor, text: torch.Tensor, options: argparse.Namespace
) -> Callable[[], object]:
    """A forward of diffusers' model, always in bfloat16."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers)
    model = randomise(model)
    model.rope = type(model.rope)(128, (1, 2, 2), 1024).to(DEVICE)
    if options.compile:
        for block in model.blocks:
            block.compile()
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[0]))[None]
    timestep = torch.tensor([500.0], device=DEVICE)
    return lambda: model(latents.to(DTYPE), timestep, padded, return_dict=False)


def milliseconds(forward: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a forward, after two warm-ups."""
    times = []
    for turn in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def per_block(make: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Milliseconds of one block."""
    times = []
    for layers in (1, 3):
        times.append(milliseconds(make(layers, *arguments)))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return (times[1] - times[0]) / 2


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=21, help="latent frames; 21 are 81 pixel frames")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both models")
    parser.add_argument("--fp8", action="store_true", help="FP8 matrix products in this project's model")
    options = parser.parse_args()
    latents = torch.randn(1, 16, options.frames, 60, 104, device=DEVICE)
    text = torch.randn(200, 4096, device=DEVICE, dtype=DTYPE)
    blocks = {make.__name__: per_block(make, latents, text, options) for make in (ours, diffusers)}
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "compiled": options.compile,
        "fp8": options.fp8,
        "tokens": options.frames * 30 * 52,
        "ms_per_block": {k: round(v, 2) for k, v in blocks.items()},
        "seconds_per_forward": {k: round(v * LAYERS / 1000, 3) for k, v in blocks.items()},
        "ratio": round(blocks["diffusers"] / blocks["ours"], 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
