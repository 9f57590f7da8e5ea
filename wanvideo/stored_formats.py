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
from .key_names import PREFIXES
from .safetensors_file import DTYPES
from .tensor_file import TensorFile, parts_of, unreadable

MARK = "comfy_quant"
MARKER = "scaled_fp8"
HEADER_FIELD = "_quantization_metadata"
LARGEST_MARK = 2**16
FP8_FORMATS = ("F8_E4M3", "F8_E5M2")
W4A8_FORMATS = ("W4A8", "W6A8")
# Formats that ComfyUI marks: in the words that users know them by, and the types that their weights are stored in.
MARKED_FORMATS = {
    "float8_e4m3fn": ("FP8", (*FP8_FORMATS, "BF16", "F16", "F32")),
    "float8_e5m2": ("FP8", (*FP8_FORMATS, "BF16", "F16", "F32")),
    "nvfp4": ("NVFP4", ("U8",)),
    "mxfp8": ("MXFP8", ("F8_E4M3",)),
    "int8_tensorwise": ("INT8", ("I8",)),
    "convrot_w4a4": ("INT4", ("I8",)),
    "asym_w4a8_int8": ("W4A8", ("I8",)),
}
# One that this pack does not read.
UNREAD_FORMATS = {"awq_w4a16": "AWQ W4A16"}
MXFP8_BLOCK = 32
ROTATION_GROUP = 256
W4A8_GROUP = 16
INT4_GROUP = 64
W4A8_NAMES = ("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction")
LIGHTX2V_NAMES = ("alpha", "input_global_scale")
COMFY, LIGHTX2V, MODELOPT = "ComfyUI", "LightX2V", "ModelOpt"
AUXILIARY = (*SCALE_NAMES, *GLOBAL_SCALE_NAMES, *INPUT_SCALE_NAMES, *LIGHTX2V_NAMES, *W4A8_NAMES, MARK)


class Mark(NamedTuple):
    """What a file says of a layer, as far as its format asks for it.

    full_precision: products shall be in base precision; rotation: columns of an integer format's rotation, 0 for none;
    group: columns of a W4A8 scale; four_bits: INT4 weights are multiplied by INT4 activations, not INT8.
    """

    format: str = ""
    full_precision: bool = False
    rotation: int = 0
    group: int = W4A8_GROUP
    four_bits: bool = True


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a model as a file stores it.

    name: in the file; shape: of the values; format: "BF16", "F8_E4M3 scaled", "INT8", "INT8 rotated", "INT4 rotated",
    "W4A8", "W6A8", "NVFP4", "MXFP8", "GGUF Q4_K"; dtype: what its expanded form has; scale, global_scale: names of the
    tensors that multiply it; codebook, correction: of W4A8's other two; input_scale: name of the scale of activations;
    mark: what the file says of it; writer: whose NVFP4 it is.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: torch.dtype
    scale: str | None = None
    global_scale: str | None = None
    input_scale: str | None = None
    codebook: str | None = None
    correction: str | None = None
    mark: Mark = Mark()
    writer: str = COMFY

    @property
    def quantized(self) -> bool:
        """Whether the values are fewer bits than bfloat16."""
        return self.format.split()[0] in (*FP8_FORMATS, "INT8", "INT4", *W4A8_FORMATS, "NVFP4", "MXFP8", BLOCKS)


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
    if mark.format and form not in MARKED_FORMATS[mark.format][1]:
        raise _incomplete(file, plain, mark.format, f"is stored as {form}")
    scale = _sibling(file, layer, SCALE_NAMES)
    plain = replace(plain, scale=scale, input_scale=_sibling(file, layer, INPUT_SCALE_NAMES), mark=mark)
    if mark.format == "mxfp8":
        return _mxfp8(file, plain)
    if mark.format == "asym_w4a8_int8":
        return _w4a8(file, plain, layer)
    if form == "U8" or form == "I8":
        # A mark is what tells rotated codes from plain ones, so that a file which has marks must have this one too.
        if marks and not mark.format:
            raise _unmarked(file, plain)
        return _nvfp4(file, plain, layer) if form == "U8" else _integers(file, plain)
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


def _integers(file: TensorFile, plain: Weight) -> Weight:
    """INT8 and INT4."""
    if plain.scale is None:
        raise _incomplete(file, plain, plain.mark.format) if plain.mark.format else _unmarked(file, plain)
    _check_scale(file, plain.scale, plain.name)
    if plain.mark.format == "convrot_w4a4":
        plain = replace(plain, shape=(*plain.shape[:-1], 2 * plain.shape[-1]), format="INT4")
    else:
        plain = replace(plain, format="INT8")
    if plain.mark.rotation:
        _check_rotation(file, plain)
        plain = replace(plain, format=f"{plain.format} rotated")
    return replace(plain, dtype=torch.float32)


def _check_rotation(file: TensorFile, plain: Weight) -> None:
    group = plain.mark.rotation
    if len(plain.shape) != 2 or plain.shape[1] % group or group & (group - 1) or group.bit_length() % 2 == 0:
        raise ValueError(
            f"{file.path.name}: '{plain.name}' of {plain.shape} is marked as rotated in groups of {group} columns, "
            "which must be a power of 4 that divides them; use another quantized file of the model."
        )


def _w4a8(file: TensorFile, plain: Weight, layer: str) -> Weight:
    names = [name if (name := f"{layer}.{leaf}") in file.tensors else None for leaf in W4A8_NAMES]
    if names[0] is None or names[1] is None:
        raise _incomplete(file, plain, plain.mark.format)
    group_scale, group = file.tensors[names[0]], plain.mark.group
    if len(plain.shape) != 2 or len(group_scale.shape) != 2:
        raise _incomplete(file, plain, plain.mark.format, "is no matrix")
    (rows, width), columns = plain.shape, group_scale.shape[1] * group
    floats = ("BF16", "F16", "F32")
    wanted = (
        ((rows, columns // group), ("F8_E4M3", "U8", "F32")), ((rows,), ("F32",)), ((16,), ("F32",)),
        ((columns // group, rows), floats),
    )  # fmt: skip
    for name, (shape, types) in zip(names, wanted, strict=True):
        stored = None if name is None else file.tensors[name]
        if stored is not None and (stored.shape != shape or stored.format not in types):
            raise ValueError(
                f"{file.path.name}: '{name}' is {stored.format} {stored.shape}, but a W4A8 weight of {(rows, columns)} "
                f"has {types[0]} {shape}; use a file as ComfyUI writes it."
            )
    bits = next((bits for bits in (4, 6) if width * 8 == columns * bits), 0)
    fits = columns % 16 == 0 and group >= 4 and (group % 16 == 0 or 16 % group == 0)
    if bits == 6:
        fits = columns % 32 == 0 and group % 16 == 0 and not any(names[2:])
    if not bits or not fits:
        raise ValueError(
            f"{file.path.name}: '{plain.name}' has {width} bytes a row for {columns} columns in groups of {group}, "
            "which are no codes of 4 or 6 bits; use a file as ComfyUI writes it."
        )
    plain = replace(plain, shape=(rows, columns), format=f"W{bits}A8", dtype=torch.float32)
    _check_rotation(file, plain)
    return replace(plain, scale=names[0], global_scale=names[1], codebook=names[2], correction=names[3])


def _mxfp8(file: TensorFile, plain: Weight) -> Weight:
    if plain.scale is None:
        raise _incomplete(file, plain, plain.mark.format)
    _check_block_scales(file, plain.scale, plain.shape, MXFP8_BLOCK, ("F8_E8M0", "U8"), "MXFP8")
    return replace(plain, format="MXFP8", dtype=torch.float32)


def _nvfp4(file: TensorFile, plain: Weight, layer: str) -> Weight:
    marked = bool(plain.mark.format)
    second = _sibling(file, layer, GLOBAL_SCALE_NAMES)
    absolute, measured = (f"{layer}.{name}" for name in LIGHTX2V_NAMES)
    if absolute in file.tensors and measured in file.tensors:
        writer, second = LIGHTX2V, absolute
        plain = replace(plain, input_scale=measured)
    else:
        writer = COMFY if marked else MODELOPT
    if not marked and (plain.scale is None or second is None):
        raise _unmarked(file, plain)
    if plain.scale is None or second is None or len(plain.shape) != 2:
        raise _incomplete(file, plain, "nvfp4")
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


def _incomplete(file: TensorFile, plain: Weight, form: str, fault: str = "lacks its scales") -> ValueError:
    return ValueError(
        f"{file.path.name}: layer '{plain.name.removesuffix('.weight')}' is marked as {MARKED_FORMATS[form][0]} but "
        f"{fault}; download it again, or use another quantized file of the model."
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
    marks = {
        _layer_of(layer, file): _mark(entry, f"{HEADER_FIELD}, layer {layer}", file) for layer, entry in entries.items()
    }
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


def _layer_of(name: str, file: TensorFile) -> str:
    """The file's own name of a layer that its header marks with or without the prefix of the model's tensors."""
    bare = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
    spellings = (name, bare, *(prefix + bare for prefix in PREFIXES))
    return next((spelling for spelling in spellings if f"{spelling}.weight" in file.tensors), name)


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
    form, inner = str(entry.get("format", "")), entry.get("params")
    settings = (inner if isinstance(inner, dict) else {}) | entry
    numbers = {"convrot_groupsize": ROTATION_GROUP, "group_size": W4A8_GROUP, "quant_group_size": INT4_GROUP}
    rotation, group, scales = (settings.get(key, default) for key, default in numbers.items())
    if any(type(number) is not int or number <= 0 for number in (rotation, group, scales)):
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' has no whole numbers as {', '.join(numbers)}"))
    activations = settings.get("linear_dtype", "int4")
    if form == "convrot_w4a4" and (scales != INT4_GROUP or activations not in ("int4", "int8")):
        raise unreadable(file.path, "quantized", ValueError(f"'{name}' asks for {activations} in groups of {scales}"))
    rotates = form in ("convrot_w4a4", "asym_w4a8_int8") or (form == "int8_tensorwise" and settings.get("convrot"))
    full_precision = bool(entry.get("full_precision_matrix_mult", False))
    return Mark(form, full_precision, rotation if rotates else 0, group, activations == "int4")
