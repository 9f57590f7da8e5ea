"""GGUF files: a checked header, and tensors as their blocks are stored.

Source: ggml's GGUF specification, versions 2 and 3; the extra field with the shape of tensors of five dimensions is
city96's (ComfyUI-GGUF). The header is read here and not by the gguf package, which builds an array for every token of
a text encoder's vocabulary and takes sizes on trust.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_file import StoredTensor, check_name, element_count, read_bytes, unreadable

MAGIC = b"GGUF"
# In front of the type in the format of a tensor that is stored in blocks.
BLOCKS = "GGUF"
VERSIONS = (2, 3)
ALIGNMENT_FIELD = "general.alignment"
SHAPE_FIELD = "comfy.gguf.orig_shape."
# A vocabulary of 256,000 tokens is 10 MB; texts and entries become Python objects several times their size.
LARGEST_HEADER = 32_000_000
MOST_ENTRIES = 100_000
MOST_DIMENSIONS = 4
MOST_SHAPE_VALUES = 8
# struct codes by the number of a field's type; 8 is text, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
SMALLEST_FIELD, SMALLEST_TENSOR = 13, 24
# Types that are values and not blocks.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}

Field = str | int | float | bool


class _Array(NamedTuple):
    """Where an array lies in the header: type of its values, their number, the first one's place."""

    kind: int
    count: int
    place: int


class _Tensor(NamedTuple):
    """offset: in the data; size: in bytes; row: bytes of a row of blocks."""

    stored: StoredTensor
    offset: int
    size: int
    row: int


class GgufFile:
    """One GGUF file. Raises ValueError if it is truncated or is not GGUF."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._fields, infos, start = _header(_Cursor(data))
                self._start = start
                tensors = {name: self._tensor(name, *info) for name, info in infos.items()}
                _check_places(tensors, len(data) - start, self._alignment())
        except (ValueError, OSError) as error:
            raise unreadable(path, "GGUF", error) from error
        self._tensors = tensors
        self.metadata: Mapping[str, str] = {
            name: str(value) for name, value in self._fields.items() if not isinstance(value, _Array)
        }
        self.tensors: Mapping[str, StoredTensor] = {name: tensor.stored for name, tensor in tensors.items()}

    def array(self, name: str) -> list[Field]:
        """The values of an array in the header; empty where there is none of this name."""
        field = self._fields.get(name)
        if not isinstance(field, _Array):
            return []
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _values(_Cursor(data, field.place), field)

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """The tensor on the CPU: values as they are, blocks as bytes, uint8 [rows, bytes of a row]."""
        tensor = self._tensors[name]
        shape, dtype = tensor.stored.shape, DTYPES.get(tensor.stored.format)
        if dtype is None:
            shape, dtype = (tensor.size // tensor.row if tensor.row else 0, tensor.row), torch.uint8
        return read_bytes(self.path, self._start + tensor.offset, shape, dtype, mapped=mapped)

    def _alignment(self) -> int:
        return self._fields.get(ALIGNMENT_FIELD, 32)

    def _shape(self, name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
        field = self._fields.get(SHAPE_FIELD + name)
        if field is None:
            return dims
        if not isinstance(field, _Array) or field.count > MOST_SHAPE_VALUES:
            raise ValueError(f"the field {SHAPE_FIELD}{name} is no shape")
        return tuple(self.array(SHAPE_FIELD + name))

    def _tensor(self, name: str, dims: tuple[int, ...], kind: int, offset: int) -> _Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"'{name}' has the unknown type {kind}")
        form = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[form]
        count = element_count(name, dims)
        columns = dims[-1] if dims else 1
        if columns % block:
            raise ValueError(f"rows of '{name}' are {columns} long, which {form.name} blocks of {block} do not fill")
        shape = self._shape(name, dims)
        if element_count(name, shape) != count:
            raise ValueError(f"'{name}' has {count} values, which its shape {shape} does not")
        stored = StoredTensor(shape=shape, format=form.name if form.name in DTYPES else f"{BLOCKS} {form.name}")
        row = columns // block * block_bytes
        return _Tensor(stored, offset, math.prod(dims[:-1]) * row, row)


class _Cursor:
    """Reads one value after the other. Raises ValueError at the end of the file, or of what a header may have."""

    def __init__(self, data: mmap.mmap, place: int = 0) -> None:
        self._data, self.place = data, place
        self.end = min(len(data), LARGEST_HEADER)

    def scalar(self, code: str) -> Field:
        """A number or a bool."""
        place = self.skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._data, place)[0]

    def text(self) -> str:
        """A text with its length in front."""
        size = self.scalar("Q")
        place = self.skip(size)
        return self._data[place : place + size].decode()

    def skip(self, size: int) -> int:
        """Go over `size` bytes; returns where they were."""
        place = self.place
        if size > self.end - place:
            raise ValueError("its header ends early")
        self.place += size
        return place

    def count(self, least: int) -> int:
        """A number of entries of at least `least` bytes each, which the header has room for."""
        number = self.scalar("Q")
        if number * least > self.end - self.place:
            raise ValueError(f"its header announces {number} entries, for which it has no room")
        return number

    def entries(self, least: int) -> int:
        """As `count`, of fields or tensors."""
        number = self.count(least)
        if number > MOST_ENTRIES:
            raise ValueError(f"its header announces {number} entries, more than any model has")
        return number


def _header(cursor: _Cursor) -> tuple[dict[str, Field | _Array], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """Fields, tensors as (dims, type, offset), and where the data starts."""
    if cursor.scalar("4s") != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, not 2 or 3")
    tensor_count, field_count = cursor.entries(SMALLEST_TENSOR), cursor.entries(SMALLEST_FIELD)
    fields = {cursor.text(): _field(cursor, cursor.scalar("I")) for _ in range(field_count)}
    alignment = fields.get(ALIGNMENT_FIELD, 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT_FIELD} is {alignment}, no power of two")
    tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        check_name(name)
        rank = cursor.scalar("I")
        if rank > MOST_DIMENSIONS:
            raise ValueError(f"'{name}' has {rank} dimensions")
        if name in tensors:
            raise ValueError(f"'{name}' is there twice")
        dims = tuple(cursor.scalar("Q") for _ in range(rank))
        tensors[name] = (dims[::-1], cursor.scalar("I"), cursor.scalar("Q"))
    return fields, tensors, -(-cursor.place // alignment) * alignment


def _field(cursor: _Cursor, kind: int) -> Field | _Array:
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind])
    if kind == TEXT:
        return cursor.text()
    if kind != ARRAY:
        raise ValueError(f"a field has the unknown type {kind}")
    inner = cursor.scalar("I")
    if inner in SCALARS:
        size = struct.calcsize(SCALARS[inner])
        count = cursor.count(size)
        return _Array(inner, count, cursor.skip(count * size))
    if inner != TEXT:
        raise ValueError(f"a field is an array of the type {inner}")
    count = cursor.count(8)
    place = cursor.place
    for _ in range(count):
        cursor.skip(cursor.scalar("Q"))
    return _Array(inner, count, place)


def _values(cursor: _Cursor, array: _Array) -> list[Field]:
    if array.kind == TEXT:
        return [cursor.text() for _ in range(array.count)]
    return [cursor.scalar(SCALARS[array.kind]) for _ in range(array.count)]


def _check_places(tensors: Mapping[str, _Tensor], size: int, alignment: int) -> None:
    last = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < last or tensor.offset % alignment:
            raise ValueError(f"'{name}' overlaps another tensor or lies between the places for tensors")
        last = tensor.offset + tensor.size
        if last > size:
            raise ValueError(f"{last - size} bytes are missing at its end, where '{name}' is")
