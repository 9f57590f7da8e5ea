"""What a model will take of a GPU, from the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..attention import BACKENDS
from ..quantized.fp8 import FP8_DTYPES
from .checkpoint import Checkpoint, open_checkpoint
from .config import WanConfig
from .host_slabs import padded_bytes
from .load_plan import LoadOptions, contents
from .loading import parameter_dtype, quantizable
from .memory import SLABS, Beside, Footprint, Precision, Work, footprint, held
from .modules.model import WanModel
from .quantization import NVFP4, QUANTIZATIONS, STORED_AS

if TYPE_CHECKING:
    from pathlib import Path

    from .systems import Systems

# Bits of a value with its scales, by what STORED_AS calls it; GGUF types have their own.
BITS = {
    "fp8_e4m3fn": 8.0, "fp8_e5m2": 8.0, "nvfp4": 4.5, "mxfp8": 8.25, "int8": 8.0, "int4": 4.0, "w4a8": 4.5, "w6a8": 6.5,
}  # fmt: skip


def config_and_footprint(
    path: Path,
    options: LoadOptions,
    systems: Systems,
    work: Work,
    *,
    reader: Callable[[Path], Checkpoint] = open_checkpoint,
) -> tuple[WanConfig, Footprint]:
    """The transformer's sizes, and what it takes under the loader's options. Only headers are read, by `reader`.

    Raises as `load_wan_model` for files that are no transformer or do not fit together.
    """
    files = contents(path, options, systems, reader=reader)
    config, checkpoint = files.config, files.checkpoint
    with torch.device("meta"):
        model = WanModel(config, files.extensions)
    sizes = _sizes(
        model,
        checkpoint,
        options,
        may_quantize=lambda name: quantizable(model, name),
        dtype_of=lambda name: parameter_dtype(name, checkpoint, options.base_dtype),
    )
    blocks = [
        sum(sizes.get(f"{stack}.{index}.{name}", 0) for name, _ in block.named_parameters())
        for stack, blocks in model.stacks().items()
        for index, block in enumerate(blocks)
    ]
    outside, precision = sum(sizes.values()) - sum(blocks), _precision(model, checkpoint, options)
    return config, footprint(config, blocks, outside, work=work, precision=precision)


def beside(
    path: Path,
    options: LoadOptions,
    systems: Systems,
    *,
    reader: Callable[[Path], Checkpoint] = open_checkpoint,
) -> Beside | None:
    """Bytes of the model beside the transformer that this file holds: as a whole, and through its slabs.

    None: it holds no such model. Raises ValueError for an incomplete file.
    """
    found = systems.beside(reader(path))
    if found is None:
        return None
    module, checkpoint = found
    sizes = _sizes(
        module, checkpoint, options, may_quantize=module.quantizable, dtype_of=lambda name: options.base_dtype
    )
    by_tensor = {id(parameter): padded_bytes(sizes[name]) for name, parameter in module.named_parameters()}
    turns = [sum(by_tensor[id(p)] for part in parts for p in part.parameters()) for parts in module.turns()]
    return Beside(sum(sizes.values()), SLABS * max(turns))


def _sizes(
    model: nn.Module,
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    may_quantize: Callable[[str], bool],
    dtype_of: Callable[[str], torch.dtype],
) -> dict[str, int]:
    """Bytes of every parameter as the loader will store it. dtype_of: of those that stay plain."""
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and may_quantize(name)
    }
    storage = QUANTIZATIONS[options.quantization].storage
    sizes = {}
    for name, parameter in model.named_parameters():
        form = checkpoint.formats.get(name, "")
        kind = STORED_AS.get(form.split()[0] if form else "") or storage
        # An FP4 option makes FP4 of a file's FP8 weights; any other storage stays as the file has it.
        if storage == NVFP4 and kind in FP8_DTYPES:
            kind = NVFP4
        if name in linear and kind is not None:
            bits = _gguf_bits(form) if kind == "gguf" else BITS[kind]
        else:
            known = name in checkpoint.shapes
            bits = 8 * (dtype_of(name) if known else options.base_dtype).itemsize
        sizes[name] = math.ceil(parameter.numel() * bits / 8)
    return sizes


def _gguf_bits(form: str) -> float:
    """Bits of a value of "GGUF Q8_0"."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[form.split()[1]]]
    return 8 * size / values


def _precision(model: WanModel, checkpoint: Checkpoint, options: LoadOptions) -> Precision:
    option = QUANTIZATIONS[options.quantization]
    stored = {form.split()[0] for name, form in checkpoint.formats.items() if name.startswith("blocks.")}
    few_bits = option.storage is not None or bool(stored & STORED_AS.keys())
    return Precision(
        itemsize=options.base_dtype.itemsize,
        fp8_rows=option.fast,
        expands=few_bits and not option.fast,
        **held(model, fused=BACKENDS[options.attention_mode].fused),
    )
