"""Quantized weights in checkpoints: which tensors belong to a weight, and what they are.

A layer's scales lie beside its weight under the names of `quantized.linear`; ComfyUI marks a layer with a `comfy_quant`
tensor (JSON) or lists it in the header. NVFP4 comes from three writers: ComfyUI (marked), LightX2V (`alpha` and
`input_global_scale` beside it) and ModelOpt (neither, block scales in rows). GGUF weights hold their scales themselves.
Source: ComfyUI (comfy/ops.py, comfy/quant_ops.py), comfy-kitchen, LightX2V (tools/convert), TensorRT Model Optimizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..kernels.fp8_rows import padded_size
from ..kernels.nvfp4 import BLOCK, CODES_PER_BYTE, SCALE_COLUMNS, SCALE_ROWS
from ..quantized.linear import GLOBAL_SCALE_NAMES, INPUT_SCALE_NAMES, SCALE_NAMES
from .gguf_file import BLOCKS
from .gguf_file import DTYPES as GGUF_DTYPES
from .safetensors_file import DTYPES
from .tensor_file import TensorFile, parts_of, unreadable

MARK = "comfy_quant"
MARKER = "scaled_fp8"
HEADER_FIELD = "_quantization_metadata"
LARGEST_MARK = 2**16
FP8_FORMATS = ("F8_E4M3", "F8_E5M2")
MARKED_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")
# Formats that ComfyUI marks and this pack does not read, in words that users know them by.
UNREAD_FORMATS = {"convrot_w4a4": "INT4 (ConvRot W4A4)", "asym_w4a8_int8": "W4A8", "awq_w4a16": "AWQ W4A16"}
MXFP8_BLOCK = 32
ROTATION_GROUP = 256
LIGHTX2V_NAMES = ("alpha", "input_global_scale")
COMFY, LIGHTX2V, MODELOPT = "ComfyUI", "LightX2V", "ModelOpt"
AUXILIARY = (*SCALE_NAMES, *GLOBAL_SCALE_NAMES, *INPUT_SCALE_NAMES, *LIGHTX2V_NAMES, MARK)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a model as a file stores it.

    name: in the file; shape: of the values; format: "BF16", "F8_E4M3 scaled", "INT8", "INT8 rotated", "NVFP4", "MXFP8",
    "GGUF Q4_K"; dtype: what its expanded form has; scale, global_scale: names of the tensors that multiply it;
    input_scale: name of the scale of activations; full_precision: the file asks for products in base precision;
    rotation: columns of an INT8 rotation's group, 0 for none; writer: whose NVFP4 it is.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: torch.dtype
    scale: str | None = None
    global_scale: str | None = None
    input_scale: str | None = None
    full_precision: bool = False
    rotation: int = 0
    writer: str = COMFY

    @property
    def quantized(self) -> bool:
        """Whether the values are fewer bits than bfloat16."""
        return self.format.split()[0] in (*FP8_FORMATS, "INT8", "NVFP4", "MXFP8", BLOCKS)


class Mark(NamedTuple):
    """What a file says of a layer: its format, whether products shall be in base precision, and its rotation."""

    format: str = ""
    full_precision: bool = False
    rotation: int = 0


def weights_of(file: TensorFile) -> dict[str, Weight]:
    """Every weight of the file by its name there; scales and markers are part of their weight, not entries.

    Raises ValueError for a quantization that cannot be read, naming it.
    """
    marks = _marks(file)
    return {name: _weight(file, name, marks) for name in file.tensors if not _is_auxiliary(name, file)}


def asks_full_precision(file: TensorFile) -> bool:
    """Whether the mark of older scaled FP8 files asks for products in base precision, by having two elements.

    Several converters write two for every model, so that it is no property of the weights.
    """
    marked = (stored for name, stored in file.tensors.items() if name.rpartition(".")[2] == MARKER)
    return any(math.prod(stored.shape) == 2 for stored in marked)


def _weight(file: TensorFile, name: str, marks: Mapping[str, Mark]) -> Weight:
    stored = file.tensors[name]
    form, _, blocks = stored.format.partition(" ")
    if form == BLOCKS:
        _check_blocks(file, name, blocks)
    dtype = DTYPES.get(form, torch.float32) if form not in GGUF_DTYPES else GGUF_DTYPES[form]
    plain = Weight(name=name, shape=stored.shape, format=stored.format, dtype=dtype)
    if not name.endswith(".weight") or form == BLOCKS:
        return plain
    layer = name.removesuffix(".weight")
    mark = marks.get(layer, Mark())
    scale = _sibling(file, layer, SCALE_NAMES)
    plain = replace(
        plain, scale=scale, input_scale=_sibling(file, layer, INPUT_SCALE_NAMES), full_precision=mark.full_precision
    )
    if mark.format == "mxfp8":
        return _mxfp8(file, plain)
    if mark.format == "nvfp4" or form == "U8":
        return _nvfp4(file, plain, layer, marked=bool(mark.format))
    if form == "I8":
        return _int8(file, plain, mark)
    if scale is None:
        return plain
    _check_scale(file, scale, name)
    return replace(plain, format=f"{form} scaled", dtype=torch.float32)


def _check_blocks(file: TensorFile, name: str, form: str) -> None:
    from ..quantized.gguf import TYPES

    if form not in TYPES:
        raise ValueError(
            f"{file.path.name}: tensor '{name}' has the GGUF type {form}, which this version cannot read; use a file "
            f"in one of {', '.join(sorted(TYPES))}."
        )


def _int8(file: TensorFile, plain: Weight, mark: Mark) -> Weight:
    if plain.scale is None:
        raise _unmarked(file, plain)
    _check_scale(file, plain.scale, plain.name)
    group = mark.rotation
    if group and (
        len(plain.shape) != 2 or plain.shape[1] % group or group & (group - 1) or group.bit_length() % 2 == 0
    ):
        raise ValueError(
            f"{file.path.name}: '{plain.name}' of {plain.shape} is marked as rotated in groups of {group} columns, "
            "which must be a power of 4 that divides them; use another quantized file of the model."
        )
    form = "INT8 rotated" if group else "INT8"
    return replace(plain, format=form, dtype=torch.float32, rotation=group)


def _mxfp8(file: TensorFile, plain: Weight) -> Weight:
    if plain.scale is None or plain.format != "F8_E4M3":
        raise _incomplete(file, plain, "MXFP8")
    _check_block_scales(file, plain.scale, plain.shape, MXFP8_BLOCK, ("F8_E8M0", "U8"), "MXFP8")
    return replace(plain, format="MXFP8", dtype=torch.float32)


def _nvfp4(file: TensorFile, plain: Weight, layer: str, *, marked: bool) -> Weight:
    second = _sibling(file, layer, GLOBAL_SCALE_NAMES)
    absolute, measured = (f"{layer}.{name}" for name in LIGHTX2V_NAMES)
    if absolute in file.tensors and measured in file.tensors:
        writer, second = LIGHTX2V, absolute
        plain = replace(plain, input_scale=measured)
    else:
        writer = COMFY if marked else MODELOPT
    if not marked and (plain.scale is None or second is None):
        raise _unmarked(file, plain)
    if plain.scale is None or second is None or plain.format != "U8" or len(plain.shape) != 2:
        raise _incomplete(file, plain, "NVFP4")
    if f"{layer}.pre_quant_scale" in file.tensors:
        raise ValueError(
            f"{file.path.name}: layer '{layer}' scales each channel of its input (pre_quant_scale), which this version "
            "cannot; use another quantized file of the model."
        )
    for name in (second, measured) if writer == LIGHTX2V else (second,):
        if math.prod(file.tensors[name].shape) != 1:
            raise ValueError(
                f"{file.path.name}: '{name}' has the shape {file.tensors[name].shape}, but NVFP4 has one such value a "
                "layer; use another quantized file of the model."
            )
    shape = (plain.shape[0], plain.shape[1] * CODES_PER_BYTE)
    if writer == MODELOPT:
        _check_row_scales(file, plain.scale, shape)
    else:
        _check_block_scales(file, plain.scale, shape, BLOCK, ("F8_E4M3", "U8"), "NVFP4")
    return replace(plain, shape=shape, format="NVFP4", dtype=torch.float32, global_scale=second, writer=writer)


def _unmarked(file: TensorFile, plain: Weight) -> ValueError:
    return ValueError(
        f"{file.path.name}: '{plain.name}' is quantized in a way this version cannot read ({plain.format}, without a "
        "comfy_quant mark or scales); use a bf16, fp16, FP8 or GGUF file of the model."
    )


def _incomplete(file: TensorFile, plain: Weight, form: str) -> ValueError:
    fault = "lacks its scales" if plain.format in ("U8", "F8_E4M3") else f"is stored as {plain.format}"
    return ValueError(
        f"{file.path.name}: layer '{plain.name.removesuffix('.weight')}' is marked as {form} but {fault}; download it "
        "again, or use another quantized file of the model."
    )


def _check_scale(file: TensorFile, scale: str, name: str) -> None:
    # By shape, not by number of values: blocks of 64 x 64 of a weight with 4096 columns are as many as its rows.
    shape, rows = file.tensors[scale].shape, file.tensors[name].shape[:1]
    if [size for size in shape if size != 1] not in ([], list(rows)):
        raise ValueError(
            f"{file.path.name}: the scale of '{name}' has the shape {shape}, but only one value per tensor or per "
            "output row can be read; use another quantized file of the model."
        )


def _check_block_scales(
    file: TensorFile, name: str, shape: tuple[int, ...], block: int, types: tuple[str, ...], form: str
) -> None:
    """Kernels read as many block scales as the weight needs, whatever is there."""
    stored = file.tensors[name]
    rows, columns = padded_size(shape[0], SCALE_ROWS), padded_size(-(-shape[-1] // block), SCALE_COLUMNS)
    fits = len(shape) == 2 and shape[1] % block == 0 and math.prod(stored.shape) == rows * columns
    if not fits or stored.format not in types:
        raise ValueError(
            f"{file.path.name}: '{name}' is {stored.format} {stored.shape}, but an {form} weight of {shape} has "
            f"{types[0]} block scales of {(rows, columns)}; use a file as ComfyUI writes it."
        )


def _check_row_scales(file: TensorFile, name: str, shape: tuple[int, int]) -> None:
    stored = file.tensors[name]
    if stored.format != "F8_E4M3" or stored.shape != (shape[0], shape[1] // BLOCK) or shape[1] % BLOCK:
        raise ValueError(
            f"{file.path.name}: '{name}' is {stored.format} {stored.shape}, but an unmarked NVFP4 weight of {shape} is "
            f"ModelOpt's, with F8_E4M3 scales of {(shape[0], shape[1] // BLOCK)}; use a file as ComfyUI writes it."
        )


def _is_auxiliary(name: str, file: TensorFile) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == MARKER or (leaf in AUXILIARY and f"{layer}.weight" in file.tensors)


def _sibling(file: TensorFile, layer: str, leaves: tuple[str, ...]) -> str | None:
    return next((f"{layer}.{leaf}" for leaf in leaves if f"{layer}.{leaf}" in file.tensors), None)


def _marks(file: TensorFile) -> dict[str, Mark]:
    # A model in parts may say in the header of each what that part holds.
    headers = (_json(part.metadata.get(HEADER_FIELD, "{}"), HEADER_FIELD, file) for part in parts_of(file))
    entries = {layer: entry for header in headers for layer, entry in header.get("layers", {}).items()}
    marks = {layer: _mark(entry, f"{HEADER_FIELD}, layer {layer}", file) for layer, entry in entries.items()}
    for name in file.tensors:
        if name.endswith(f".{MARK}"):
            marks[name.removesuffix(f".{MARK}")] = _mark(_json(_mark_text(file, name), name, file), name, file)
    unread = sorted({mark.format for mark in marks.values()} - set(MARKED_FORMATS))
    if unread:
        raise ValueError(
            f"{file.path.name} is quantized as {', '.join(UNREAD_FORMATS.get(form, form) for form in unread)}, which "
            f"this version cannot read; use a file in {', '.join(MARKED_FORMATS)}, GGUF or bf16."
        )
    return marks


def _mark_text(file: TensorFile, name: str) -> bytes:
    stored = file.tensors[name]
    if stored.format != "U8" or math.prod(stored.shape) > LARGEST_MARK:
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' is no text"))
    return bytes(file.read(name).flatten().tolist())


def _json(text: str | bytes, name: str, file: TensorFile) -> dict[str, object]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' is no JSON: {error}")) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("layers", {}), dict):
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' is no JSON object of layers"))
    return entry


def _mark(entry: object, name: str, file: TensorFile) -> Mark:
    if isinstance(entry, str):
        entry = {"format": entry}
    if not isinstance(entry, dict) or not str(entry.get("format")).isprintable():
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' is neither a format nor a JSON object"))
    inner = entry.get("params")
    settings = (inner if isinstance(inner, dict) else {}) | entry
    group = settings.get("convrot_groupsize", ROTATION_GROUP) if settings.get("convrot") else 0
    if type(group) is not int or group < 0:
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' has no whole number as convrot_groupsize"))
    return Mark(str(entry.get("format", "")), bool(entry.get("full_precision_matrix_mult", False)), group)
