"""What LoRAs and storages cost in a stack of blocks of Wan 14B at 832x480, 81 frames, in one run.

    python benchmarks/storages.py [--frames 21] [--compile] [--rank 64] [--storage fp8_fast bf16 Q4_K ...]

For each storage: milliseconds of a block (the difference of a stack of three and one of one), alone and with a LoRA
beside all its linear layers. Prints one JSON line. ratios: a block's time over bf16's, and with the LoRA over without;
the aim is at most 1.06 for the LoRA beside fp8_fast. Storages: bf16, fp8_fast, int8, int8_fast, w4a8, w4a8_fast, and
GGUF types such as Q4_K and Q8_0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor, nn
from wanvideo_wrapper.bench.clock import seconds
from wanvideo_wrapper.fp8_optimization import keeps_precision
from wanvideo_wrapper.quantized.fp8 import Fp8Linear
from wanvideo_wrapper.quantized.gguf import GgufLinear
from wanvideo_wrapper.quantized.int8 import Int8Linear
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.quantized.w4a8 import W4a8Linear
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.lora import LoraFile, beside
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

E4M3 = torch.float8_e4m3fn
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
STORAGES: dict[str, Callable[[Tensor, Tensor], QuantizedLinear]] = {
    "fp8": lambda weight, bias: Fp8Linear.quantize(weight, bias, E4M3),
    "fp8_fast": lambda weight, bias: Fp8Linear.fast_kind(DEVICE).quantize(weight, bias, E4M3),
    "int8": Int8Linear.quantize,
    "int8_fast": lambda weight, bias: Int8Linear.fast_kind(DEVICE).quantize(weight, bias),
    "w4a8": W4a8Linear.quantize,
    "w4a8_fast": lambda weight, bias: W4a8Linear.fast_kind(DEVICE).quantize(weight, bias),
}


def blocks_of(weight: Tensor, form: str) -> Tensor:
    """Bytes of GGUF blocks for a weight of this shape: zeros, which take as long as any other."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[form]]
    return torch.zeros(weight.shape[0], weight.shape[1] // values * size, dtype=torch.uint8, device=weight.device)


def layer_of(storage: str, plain: nn.Linear) -> nn.Linear:
    """The layer in this storage."""
    if storage == "bf16":
        return plain
    if storage in STORAGES:
        return STORAGES[storage](plain.weight.detach(), plain.bias.detach())
    return GgufLinear(blocks_of(plain.weight, storage), storage, plain.bias.detach())


def model_of(layers: int, storage: str) -> WanModel:
    """A stack of blocks of 14B with random weights."""
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=layers))
    model = model.to_empty(device=DEVICE).to(DTYPE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name.startswith("blocks.") and not keeps_precision(name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer_of(storage, layer))
    return model


def lora_of(path: Path, layers: int, rank: int) -> LoraFile:
    """Pairs for every linear layer of the blocks."""
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=layers))
    pairs = {}
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, nn.Linear):
            down, up = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
            pairs |= {
                f"blocks.{name}.lora_A.weight": down.to(DTYPE),
                f"blocks.{name}.lora_B.weight": up.to(DTYPE) * 0.01,
            }
    save_file(pairs, path)
    return LoraFile(path=path, merge=False)


def per_block(storage: str, inputs: ModelInputs, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Milliseconds of one block, alone and with the LoRA."""
    times: dict[str, list[float]] = {"alone": [], "with a LoRA": []}
    for layers in (1, 3):
        model = model_of(layers, storage)
        if options.compile:
            for block in model.blocks:
                block.compile(fullgraph=True)
        lora = lora_of(folder / f"{layers}.safetensors", layers, options.rank)
        for name, found in times.items():
            with nullcontext() if name == "alone" else beside(model, (lora,), DEVICE, DTYPE):
                found.append(1000 * seconds({"": partial(model, inputs)}, DEVICE)[""])
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return {name: (more - one) / 2 for name, (one, more) in times.items()}


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=21, help="latent frames; 21 are 81 pixel frames")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--storage", nargs="+", default=["bf16", "fp8_fast", "Q4_K", "Q8_0", "int8_fast", "w4a8_fast"])
    options = parser.parse_args()
    inputs = ModelInputs(
        latents=torch.randn(1, 16, options.frames, 60, 104, device=DEVICE),
        timestep=torch.tensor([500.0], device=DEVICE),
        text=(torch.randn(200, 4096, device=DEVICE, dtype=DTYPE),),
    )
    with tempfile.TemporaryDirectory() as folder:
        wanted = dict.fromkeys(("bf16", *options.storage))
        blocks = {storage: per_block(storage, inputs, options, Path(folder)) for storage in wanted}
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "compiled": options.compile,
        "rank": options.rank,
        "ms_per_block": {storage: {k: round(v, 2) for k, v in times.items()} for storage, times in blocks.items()},
        "over_bf16": {storage: round(times["alone"] / blocks["bf16"]["alone"], 3) for storage, times in blocks.items()},
        "lora_over_alone": {s: round(times["with a LoRA"] / times["alone"], 3) for s, times in blocks.items()},
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
