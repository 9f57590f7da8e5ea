"""Quantised weights in checkpoints: which tensors belong to a weight, and its value in float32.

value = q * scale for FP8 and INT8, with one scale per tensor or per output row; e2m1 * block scale * global scale for
NVFP4. The scale is named `scale_weight` in older FP8 files, `weight_scale` in ComfyUI's and LightX2V's; ComfyUI marks
a layer with a `comfy_quant` tensor (JSON) or lists it in the header. Source: ComfyUI and comfy-kitchen formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .safetensors_file import DTYPES
from .tensor_file import TensorFile

SCALE_NAMES = ("weight_scale", "scale_weight")
GLOBAL_SCALE_NAMES = ("weight_scale_2", "scale_weight_2")
UNREAD_NAMES = ("input_scale", "scale_input", "comfy_quant")
MARKER = "scaled_fp8"
HEADER_FIELD = "_quantization_metadata"
FP8_FORMATS = ("F8_E4M3", "F8_E5M2")
MARKED_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4")
CODES_PER_BYTE = 2


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a model as a file stores it.

    name: in the file; shape: of the values; format: stored type, with "scaled" where a scale belongs to it;
    dtype: what `read_weight` returns; scale, global_scale: names of the tensors that multiply it.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: torch.dtype
    scale: str | None = None
    global_scale: str | None = None

    @property
    def quantised(self) -> bool:
        """Whether the values are fewer bits than bfloat16."""
        return self.format.split()[0] in (*FP8_FORMATS, "I8", "NVFP4", "Q8_0")


def weights_of(file: TensorFile) -> dict[str, Weight]:
    """Every weight of the file by its name there; scales and markers are part of their weight, not entries.

    Raises ValueError for a quantisation that cannot be read, naming it.
    """
    marks = _marks(file)
    found: dict[str, Weight] = {}
    for name in file.tensors:
        if not _is_auxiliary(name, file):
            found[name] = _weight(file, name, marks)
    return found


def read_weight(file: TensorFile, weight: Weight) -> Tensor:
    """The values: as stored where nothing scales them, else float32."""
    stored = file.read(weight.name)
    if weight.format == "NVFP4":
        return _nvfp4(file, weight, stored)
    if weight.scale is None:
        return stored
    return stored.float().mul_(_broadcast(file.read(weight.scale).float(), weight, file))


def _weight(file: TensorFile, name: str, marks: Mapping[str, str]) -> Weight:
    stored = file.tensors[name]
    layer = name.removesuffix(".weight")
    scale = _sibling(file, layer, SCALE_NAMES) if name.endswith(".weight") else None
    if marks.get(layer) == "nvfp4" and name.endswith(".weight"):
        second = _sibling(file, layer, GLOBAL_SCALE_NAMES)
        if scale is None or second is None or stored.format != "U8":
            raise ValueError(f"{file.path.name}: layer '{layer}' is marked as NVFP4 but lacks its scales.")
        shape = (*stored.shape[:-1], stored.shape[-1] * CODES_PER_BYTE)
        return Weight(name=name, shape=shape, format="NVFP4", dtype=torch.float32, scale=scale, global_scale=second)
    if name.endswith(".weight") and (stored.format == "U8" or (stored.format == "I8" and scale is None)):
        raise ValueError(
            f"{file.path.name}: '{name}' is quantised in a way this version cannot read ({stored.format}, without a "
            "comfy_quant mark); use a bf16, fp16, FP8 or GGUF file of the model."
        )
    if scale is not None:
        return Weight(name=name, shape=stored.shape, format=f"{stored.format} scaled", dtype=torch.float32, scale=scale)
    dtype = DTYPES.get(stored.format, torch.float32)
    return Weight(name=name, shape=stored.shape, format=stored.format, dtype=dtype)


def _is_auxiliary(name: str, file: TensorFile) -> bool:
    layer, _, leaf = name.rpartition(".")
    if leaf == MARKER:
        return True
    if leaf not in (*SCALE_NAMES, *GLOBAL_SCALE_NAMES, *UNREAD_NAMES):
        return False
    return f"{layer}.weight" in file.tensors


def _sibling(file: TensorFile, layer: str, leaves: tuple[str, ...]) -> str | None:
    return next((f"{layer}.{leaf}" for leaf in leaves if f"{layer}.{leaf}" in file.tensors), None)


def _marks(file: TensorFile) -> dict[str, str]:
    marks = {}
    header = json.loads(file.metadata.get(HEADER_FIELD, "{}")).get("layers", {})
    for layer, entry in header.items():
        marks[layer] = entry if isinstance(entry, str) else entry.get("format", "")
    for name in file.tensors:
        if name.endswith(".comfy_quant"):
            mark = json.loads(bytes(file.read(name).tolist()).decode())
            marks[name.removesuffix(".comfy_quant")] = mark.get("format", "")
    unread = sorted(set(marks.values()) - set(MARKED_FORMATS))
    if unread:
        raise ValueError(
            f"{file.path.name} is quantised as {', '.join(unread)}, which this version cannot read; use a file in "
            f"{', '.join(MARKED_FORMATS)} or bf16."
        )
    return marks


def _broadcast(scale: Tensor, weight: Weight, file: TensorFile) -> Tensor:
    rows = weight.shape[0] if weight.shape else 1
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() == rows and scale.shape[0] == rows:
        return scale.reshape(rows, *(1 for _ in weight.shape[1:]))
    raise ValueError(
        f"{file.path.name}: the scale of '{weight.name}' has the shape {tuple(scale.shape)}, but only one value per "
        "tensor or per output row can be read; use another quantised file of the model."
    )


def _nvfp4(file: TensorFile, weight: Weight, codes: Tensor) -> Tensor:
    from comfy_kitchen import dequantize_nvfp4

    overall, blocks = file.read(weight.global_scale).float(), file.read(weight.scale)
    return dequantize_nvfp4(codes, overall, blocks, output_type=torch.float32)
