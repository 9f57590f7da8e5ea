"""Quantised weights in checkpoints: which tensors belong to a weight, and its value in float32.

value = q * scale for FP8 and INT8, with one scale per tensor or per output row; e2m1 * block scale * global scale for
NVFP4. The scale is named `scale_weight` in older FP8 files, `weight_scale` in ComfyUI's and LightX2V's; ComfyUI marks
a layer with a `comfy_quant` tensor (JSON) or lists it in the header. Source: ComfyUI and comfy-kitchen formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.fp8_rows import padded_size
from ..kernels.nvfp4 import BLOCK, CODES_PER_BYTE, SCALE_COLUMNS, SCALE_ROWS
from ..quantized.linear import GLOBAL_SCALE_NAMES, INPUT_SCALE_NAMES, SCALE_NAMES
from .safetensors_file import DTYPES
from .tensor_file import TensorFile, parts_of, unreadable

MARK = "comfy_quant"
MARKER = "scaled_fp8"
HEADER_FIELD = "_quantization_metadata"
FP8_FORMATS = ("F8_E4M3", "F8_E5M2")
MARKED_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a model as a file stores it.

    name: in the file; shape: of the values; format: stored type, with "scaled" where a scale belongs to it;
    dtype: what `read_weight` returns; scale, global_scale: names of the tensors that multiply it; input_scale: name of
    the scale of activations; full_precision: the file asks for products in base precision.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: torch.dtype
    scale: str | None = None
    global_scale: str | None = None
    input_scale: str | None = None
    full_precision: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the values are fewer bits than bfloat16."""
        return self.format.split()[0] in (*FP8_FORMATS, "I8", "NVFP4", "Q8_0")


class Stored(NamedTuple):
    """A weight as it is stored, with its scales as float32; None where the file has none.

    values [N, K], or NVFP4 codes [N, K / 2]; scale: of the tensor, of its rows, or NVFP4's E4M3 block scales;
    input_scale: None too where it is 1, which files write where none was measured, or is no single value.
    """

    values: Tensor
    scale: Tensor | None
    global_scale: Tensor | None
    input_scale: Tensor | None


class Mark(NamedTuple):
    """What a file says of a layer: its format, and whether products shall be in base precision."""

    format: str = ""
    full_precision: bool = False


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


def asks_full_precision(file: TensorFile) -> bool:
    """Whether the mark of older scaled FP8 files asks for products in base precision, by having two elements.

    Several converters write two for every model, so that it is no property of the weights.
    """
    marked = (stored for name, stored in file.tensors.items() if name.rpartition(".")[2] == MARKER)
    return any(math.prod(stored.shape) == 2 for stored in marked)


def read_weight(file: TensorFile, weight: Weight) -> Tensor:
    """The values: as stored where nothing scales them, else float32."""
    stored = file.read(weight.name)
    if weight.format == "NVFP4":
        return _nvfp4(file, weight, stored)
    if weight.scale is None:
        return stored
    return stored.float().mul_(_broadcast(file.read(weight.scale).float(), weight))


def read_stored(file: TensorFile, weight: Weight) -> Stored:
    """The tensors of a weight, nothing expanded."""
    scale = None if weight.scale is None else file.read(weight.scale)
    overall = None if weight.global_scale is None else file.read(weight.global_scale).float()
    activations = None if weight.input_scale is None else file.read(weight.input_scale).float()
    if activations is not None and (activations.numel() != 1 or activations.item() == 1):
        activations = None
    if scale is not None and weight.format != "NVFP4":
        scale = scale.float()
    return Stored(file.read(weight.name), scale, overall, activations)


def _weight(file: TensorFile, name: str, marks: Mapping[str, Mark]) -> Weight:
    stored = file.tensors[name]
    if not name.endswith(".weight"):
        return Weight(
            name=name, shape=stored.shape, format=stored.format, dtype=DTYPES.get(stored.format, torch.float32)
        )
    layer = name.removesuffix(".weight")
    scale, mark = _sibling(file, layer, SCALE_NAMES), marks.get(layer, Mark())
    activations = _sibling(file, layer, INPUT_SCALE_NAMES)
    if mark.format == "nvfp4":
        second = _sibling(file, layer, GLOBAL_SCALE_NAMES)
        if scale is None or second is None or stored.format != "U8":
            raise ValueError(
                f"{file.path.name}: layer '{layer}' is marked as NVFP4 but lacks its scales; download it again, or use "
                "another quantised file of the model."
            )
        shape = (*stored.shape[:-1], stored.shape[-1] * CODES_PER_BYTE)
        _check_block_scales(file, scale, shape)
        return Weight(
            name=name, shape=shape, format="NVFP4", dtype=torch.float32, scale=scale, global_scale=second,
            input_scale=activations, full_precision=mark.full_precision,
        )  # fmt: skip
    if stored.format == "U8" or (stored.format == "I8" and scale is None):
        raise ValueError(
            f"{file.path.name}: '{name}' is quantised in a way this version cannot read ({stored.format}, without a "
            "comfy_quant mark); use a bf16, fp16, FP8 or GGUF file of the model."
        )
    if scale is not None:
        _check_scale(file, scale, name)
    form = stored.format if scale is None else f"{stored.format} scaled"
    dtype = torch.float32 if scale is not None else DTYPES.get(stored.format, torch.float32)
    return Weight(
        name=name, shape=stored.shape, format=form, dtype=dtype, scale=scale, input_scale=activations,
        full_precision=mark.full_precision,
    )  # fmt: skip


def _check_scale(file: TensorFile, scale: str, name: str) -> None:
    # By shape, not by number of values: blocks of 64 x 64 of a weight with 4096 columns are as many as its rows.
    shape, rows = file.tensors[scale].shape, file.tensors[name].shape[:1]
    if [size for size in shape if size != 1] not in ([], list(rows)):
        raise ValueError(
            f"{file.path.name}: the scale of '{name}' has the shape {shape}, but only one value per tensor or per "
            "output row can be read; use another quantised file of the model."
        )


def _check_block_scales(file: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    """Kernels read as many block scales as the weight needs, whatever is there."""
    stored = file.tensors[name]
    rows, columns = padded_size(shape[0], SCALE_ROWS), padded_size(-(-shape[-1] // BLOCK), SCALE_COLUMNS)
    if len(shape) != 2 or stored.format != "F8_E4M3" or math.prod(stored.shape) != rows * columns:
        raise ValueError(
            f"{file.path.name}: '{name}' is {stored.format} {stored.shape}, but an NVFP4 weight of {shape} has F8_E4M3 "
            f"block scales of {(rows, columns)}; use a file as ComfyUI writes it."
        )


def _is_auxiliary(name: str, file: TensorFile) -> bool:
    layer, _, leaf = name.rpartition(".")
    if leaf == MARKER:
        return True
    if leaf not in (*SCALE_NAMES, *GLOBAL_SCALE_NAMES, *INPUT_SCALE_NAMES, MARK):
        return False
    return f"{layer}.weight" in file.tensors


def _sibling(file: TensorFile, layer: str, leaves: tuple[str, ...]) -> str | None:
    return next((f"{layer}.{leaf}" for leaf in leaves if f"{layer}.{leaf}" in file.tensors), None)


def _marks(file: TensorFile) -> dict[str, Mark]:
    # A model in parts may say in the header of each what that part holds.
    headers = (_json(part.metadata.get(HEADER_FIELD, "{}"), HEADER_FIELD, file) for part in parts_of(file))
    entries = {layer: entry for header in headers for layer, entry in header.get("layers", {}).items()}
    marks = {layer: _mark(entry, f"{HEADER_FIELD}, layer {layer}", file) for layer, entry in entries.items()}
    for name in file.tensors:
        if name.endswith(f".{MARK}"):
            marks[name.removesuffix(f".{MARK}")] = _mark(_json(bytes(file.read(name).tolist()), name, file), name, file)
    unread = sorted({mark.format for mark in marks.values()} - set(MARKED_FORMATS))
    if unread:
        raise ValueError(
            f"{file.path.name} is quantised as {', '.join(unread)}, which this version cannot read; use a file in "
            f"{', '.join(MARKED_FORMATS)} or bf16."
        )
    return marks


def _json(text: str | bytes, name: str, file: TensorFile) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise unreadable(file.path, "quantised", ValueError(f"'{name}' is no JSON: {error}")) from error
    if not isinstance(found, dict) or not isinstance(found.get("layers", {}), dict):
        raise unreadable(file.path, "quantised", ValueError(f"'{name}' is no JSON object of layers"))
    return found


def _mark(entry: object, name: str, file: TensorFile) -> Mark:
    if isinstance(entry, str):
        return Mark(entry)
    if not isinstance(entry, dict):
        raise unreadable(file.path, "quantised", ValueError(f"'{name}' is neither a format nor a JSON object"))
    return Mark(str(entry.get("format", "")), bool(entry.get("full_precision_matrix_mult", False)))


def _broadcast(scale: Tensor, weight: Weight) -> Tensor:
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *(1 for _ in weight.shape[1:]))


def _nvfp4(file: TensorFile, weight: Weight, codes: Tensor) -> Tensor:
    from comfy_kitchen import dequantize_nvfp4

    overall, blocks = file.read(weight.global_scale).float(), file.read(weight.scale)
    return dequantize_nvfp4(codes, overall, blocks, output_type=torch.float32)
