"""Reading weights: expanded to values, or as layers store them, whoever wrote the file.

What each storage's values are, its layer says (quantized/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from comfy_kitchen import swap_nibbles, to_blocked
from torch import Tensor

from ..quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from ..quantized.gguf import GgufLinear, dequantize
from ..quantized.int4 import Int4Linear
from ..quantized.int8 import Int8Linear
from ..quantized.linear import QuantizedLinear
from ..quantized.mxfp8 import Mxfp8Linear
from ..quantized.nvfp4 import Nvfp4, Nvfp4Linear, Nvfp4MatmulLinear
from ..quantized.w4a8 import W4a8, W4a8Linear
from .gguf_file import BLOCKS
from .stored_formats import FP8_FORMATS, LIGHTX2V, MODELOPT, W4A8_FORMATS, Weight
from .tensor_file import TensorFile


class Stored(NamedTuple):
    """A weight as it is stored, with its scales as float32 but for those of blocks and groups; None where it has none.

    values [N, K], codes of several columns in a byte in ComfyUI's order, or GGUF blocks [N, bytes]; scale: of the
    tensor, of its rows or groups, or block scales in cuBLAS' order; global_scale: W4A8's scales of rows too;
    input_scale: None too where it is 1, which files write where none was measured, or is no single value.
    """

    values: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    codebook: Tensor | None = None
    correction: Tensor | None = None


def read_weight(file: TensorFile, weight: Weight, *, mapped: bool = False) -> Tensor:
    """The values: as stored where nothing scales them, else float32. mapped: see `TensorFile.read`."""
    form, _, blocks = weight.format.partition(" ")
    if form == BLOCKS:
        return dequantize(file.read(weight.name, mapped=True), blocks, torch.float32).reshape(weight.shape)
    if weight.scale is None:
        return file.read(weight.name, mapped=mapped)
    stored = read_stored(file, weight)
    if form not in FP8_FORMATS and weight.quantized and len(weight.shape) == 2:
        return layer_of(stored, weight, weight.shape, None).expanded(torch.float32)
    trailing = (1 for _ in weight.shape[1:])
    scale = stored.scale.reshape(()) if stored.scale.numel() == 1 else stored.scale.reshape(-1, *trailing)
    return stored.values.float().mul_(scale)


def read_stored(file: TensorFile, weight: Weight) -> Stored:
    """The tensors of a weight, nothing expanded."""
    values = file.read(weight.name)
    scale, overall, activations, codebook, correction = (
        None if name is None else file.read(name)
        for name in (weight.scale, weight.global_scale, weight.input_scale, weight.codebook, weight.correction)
    )
    if weight.format == "NVFP4":
        values, scale, overall, activations = _as_comfy(weight.writer, values, scale, overall, activations)
    elif weight.format in W4A8_FORMATS and scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e4m3fn)
    elif scale is not None and weight.format not in ("MXFP8", *W4A8_FORMATS):
        scale = scale.float()
    if activations is not None:
        activations = activations.float()
        if activations.numel() != 1 or activations.item() == 1:
            activations = None
    return Stored(values, scale, overall, activations, codebook, correction)


def _as_comfy(
    writer: str, codes: Tensor, scale: Tensor, overall: Tensor, activations: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """NVFP4 of another writer in ComfyUI's order and scales.

    Both others hold the even column in the lower half of a byte. LightX2V's `overall` is alpha, the reciprocal of the
    product of two factors, of weights and of activations, by which values were multiplied before they were rounded.
    """
    scale, overall = scale.view(torch.float8_e4m3fn), overall.float().reshape(())
    if writer == LIGHTX2V:
        factor = activations.float().reshape(())
        return swap_nibbles(codes), scale, overall * factor, 1 / factor
    if writer == MODELOPT:
        blocked = to_blocked(scale.view(torch.uint8), flatten=False).view(torch.float8_e4m3fn)
        return swap_nibbles(codes), blocked, overall, activations
    return codes, scale, overall, activations


def layer_of(
    stored: Stored, weight: Weight, shape: Sequence[int], bias: Tensor | None, *, fast: torch.device | None = None
) -> QuantizedLinear:
    """The layer of a quantized weight. shape: (N, K) of the model's layer.

    fast: the device on which products shall be in few bits, where it has such products for the storage.
    """
    form, _, blocks = weight.format.partition(" ")
    scales, options = (stored.values, stored.scale), {}
    if form == BLOCKS:
        kind, parts = GgufLinear, (stored.values.reshape(shape[0], -1), blocks)
    elif form == "NVFP4":
        kind, parts = Nvfp4Linear, (Nvfp4(*scales, stored.global_scale), tuple(shape))
    elif form == "MXFP8":
        kind, parts = Mxfp8Linear, (*scales, tuple(shape))
    elif form in W4A8_FORMATS:
        rest = (stored.global_scale, stored.codebook, stored.correction)
        kind, parts = W4a8Linear, (W4a8(*scales, *rest, weight.mark.group, weight.mark.rotation),)
    elif form == "INT4":
        kind, parts, options = Int4Linear, scales, {"group": weight.mark.rotation, "four_bits": weight.mark.four_bits}
    elif form == "INT8":
        kind, parts, options = Int8Linear, scales, {"group": weight.mark.rotation}
    else:
        kind, parts = Fp8Linear, scales
    if fast is not None:
        kind = kind.fast_kind(fast)
    if issubclass(kind, Fp8MatmulLinear | Nvfp4MatmulLinear):
        options = {"input_scale": stored.input_scale}
    return kind(*parts, bias, **options)
