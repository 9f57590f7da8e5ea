"""Reading weights: expanded to values, or as layers store them, whoever wrote the file.

value = q * scale for FP8 and INT8, with one scale per tensor or per output row; e2m1 * block scale * global scale for
NVFP4, e4m3 * block scale for MXFP8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..quantized.gguf import GgufLinear, dequantize
from ..quantized.linear import QuantizedLinear
from .gguf_file import BLOCKS
from .stored_formats import LIGHTX2V, MODELOPT, Weight
from .tensor_file import TensorFile


class Stored(NamedTuple):
    """A weight as it is stored, with its scales as float32; None where the file has none.

    values [N, K], NVFP4 codes [N, K / 2] in ComfyUI's order, or GGUF blocks [N, bytes]; scale: of the tensor, of its
    rows, or block scales in cuBLAS' order; input_scale: None too where it is 1, which files write where none was
    measured, or is no single value; rotation: see `Weight`.
    """

    values: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    rotation: int = 0


def read_weight(file: TensorFile, weight: Weight) -> Tensor:
    """The values: as stored where nothing scales them, else float32."""
    form, _, blocks = weight.format.partition(" ")
    if form == BLOCKS:
        return dequantize(file.read(weight.name), blocks, torch.float32).reshape(weight.shape)
    if weight.scale is None:
        return file.read(weight.name)
    stored = read_stored(file, weight)
    if form == "NVFP4":
        from ..quantized.nvfp4 import Nvfp4, values_of

        return values_of(Nvfp4(stored.values, stored.scale, stored.global_scale))
    if form == "MXFP8":
        from ..quantized.mxfp8 import mxfp8_values

        return mxfp8_values(stored.values, stored.scale, torch.float32)
    trailing = (1 for _ in weight.shape[1:])
    scale = stored.scale.reshape(()) if stored.scale.numel() == 1 else stored.scale.reshape(-1, *trailing)
    values = stored.values.float().mul_(scale)
    if not stored.rotation:
        return values
    from ..quantized.int8 import rotated

    return rotated(values, stored.rotation)


def read_stored(file: TensorFile, weight: Weight) -> Stored:
    """The tensors of a weight, nothing expanded."""
    values = file.read(weight.name)
    scale, overall, activations = (
        None if name is None else file.read(name) for name in (weight.scale, weight.global_scale, weight.input_scale)
    )
    if weight.format == "NVFP4":
        values, scale, overall, activations = _as_comfy(weight.writer, values, scale, overall, activations)
    elif scale is not None and weight.format != "MXFP8":
        scale = scale.float()
    if activations is not None:
        activations = activations.float()
        if activations.numel() != 1 or activations.item() == 1:
            activations = None
    return Stored(values, scale, overall, activations, weight.rotation)


def _as_comfy(
    writer: str, codes: Tensor, scale: Tensor, overall: Tensor, activations: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """NVFP4 of another writer in ComfyUI's order and scales.

    Both others hold the even column in the lower half of a byte. LightX2V's `overall` is alpha, the reciprocal of the
    product of two factors, of weights and of activations, by which values were multiplied before they were rounded.
    """
    from comfy_kitchen import swap_nibbles, to_blocked

    scale, overall = scale.view(torch.float8_e4m3fn), overall.float().reshape(())
    if writer == LIGHTX2V:
        factor = activations.float().reshape(())
        return swap_nibbles(codes), scale, overall * factor, 1 / factor
    if writer == MODELOPT:
        blocked = to_blocked(scale.view(torch.uint8), flatten=False).view(torch.float8_e4m3fn)
        return swap_nibbles(codes), blocked, overall, activations
    return codes, scale, overall, activations


def expanding_layer(stored: Stored, form: str, shape: tuple[int, int], bias: Tensor | None) -> QuantizedLinear | None:
    """The layer of a storage that has only one kind of product; None for FP8, NVFP4 and plain values.

    form: see `Weight.format`; shape: (N, K) of the model's layer.
    """
    kind, _, blocks = form.partition(" ")
    if kind == BLOCKS:
        return GgufLinear(stored.values.reshape(shape[0], -1), blocks, bias)
    if kind == "MXFP8":
        from ..quantized.mxfp8 import Mxfp8Linear

        return Mxfp8Linear(stored.values, stored.scale, shape, bias)
    if kind == "INT8":
        from ..quantized.int8 import Int8Linear

        return Int8Linear(stored.values, stored.scale, bias, stored.rotation)
    return None
