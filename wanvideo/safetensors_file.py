"""Safetensors files: a checked header, and tensors in storage of their own.

Source: the format's specification (huggingface/safetensors): eight bytes of header length, a JSON header, the data.
The header is at least as strict as the reference library's: tensors fill the file without gaps or overlap. They are
packed back to back, so views of a mapped file start at any byte; what is kept is read into fresh memory instead, which
torch aligns, and a file larger than main memory can still be inspected.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .tensor_file import StoredTensor, byte_range, check_name, element_count, read_bytes, unreadable
from .whole_file import partial_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bits of the types that the format has and this pack cannot use; a file may hold such a tensor unread.
UNUSED_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64,
}  # fmt: skip
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | UNUSED_BITS
LENGTH_BYTES = 8
# A model has at most a few thousand tensors of about a hundred bytes; Python objects of a header take up to 24 times
# its bytes, so both its length and its lists and tables are bounded.
LARGEST_HEADER = 8_000_000
MOST_CONTAINERS = 500_000
METADATA = "__metadata__"
ENTRY = {"dtype", "shape", "data_offsets"}


class SafetensorsFile:
    """One safetensors file. Raises ValueError if it is truncated or is not safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str]
        self.tensors: Mapping[str, StoredTensor]
        try:
            size = path.stat().st_size
            header, self._start = _header(path, size)
            self.metadata = _metadata(header.pop(METADATA, {}))
            self.tensors = {name: _stored(name, entry) for name, entry in header.items()}
            self._places = {name: _place(name, header[name], stored) for name, stored in self.tensors.items()}
            _check_filled(list(self._places.values()), size - self._start)
        except (ValueError, OSError) as error:
            raise unreadable(path, "safetensors", error) from error

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """The stored tensor, on the CPU, in its stored type."""
        stored = self.tensors[name]
        if stored.format not in DTYPES:
            raise ValueError(
                f"{self.path.name}: tensor '{name}' has the type {stored.format}; use a file whose tensors are "
                f"{', '.join(DTYPES)}."
            )
        begin = self._start + self._places[name][0]
        return read_bytes(self.path, begin, stored.shape, DTYPES[stored.format], mapped=mapped)


def _header(path: Path, size: int) -> tuple[dict[str, object], int]:
    """The JSON header, and where the data starts."""
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - LENGTH_BYTES:
            raise ValueError("its header is longer than the file")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header has {length} bytes")
        text = file.read(length)
    if not text.startswith(b"{") or text.count(b"{") + text.count(b"[") > MOST_CONTAINERS:
        raise ValueError("its header is no table of tensors")
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_table, parse_constant=_refuse_constant
        ), LENGTH_BYTES + length
    except RecursionError:
        raise ValueError("its header is no table of tensors, but nested") from None


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names something twice")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its header contains {name}")


def _metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"{METADATA} is no table of texts")
    # A lone surrogate could neither be logged nor written again.
    for text in (*entry, *entry.values()):
        text.encode()
    return entry


def _stored(name: str, entry: object) -> StoredTensor:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != ENTRY:
        raise ValueError(f"the entry of '{name}' is not made of {', '.join(sorted(ENTRY))}")
    shape, form = entry["shape"], entry["dtype"]
    if not isinstance(form, str) or form not in BITS:
        raise ValueError(f"'{name}' has no type that safetensors knows")
    if not isinstance(shape, list):
        raise ValueError(f"the shape of '{name}' is no list")
    element_count(name, shape)
    return StoredTensor(shape=tuple(shape), format=form)


def _place(name: str, entry: dict[str, object], stored: StoredTensor) -> tuple[int, int]:
    """Where the tensor begins and ends in the data."""
    begin, end = byte_range(name, entry["data_offsets"])
    if 8 * (end - begin) != element_count(name, stored.shape) * BITS[stored.format]:
        raise ValueError(f"the size of '{name}' does not fit its shape {stored.shape} of {stored.format}")
    return begin, end


def _check_filled(places: Sequence[tuple[int, int]], size: int) -> None:
    last = 0
    for begin, end in sorted(places):
        if begin != last:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(begin, last)} of the data")
        last = end
    if last > size:
        raise ValueError(f"{last - size} bytes are missing at its end")
    if last < size:
        raise ValueError(f"{size - last} bytes at its end belong to no tensor")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that appears whole, safe from a power cut, or not at all.

    Raises OSError where it cannot be written: safetensors' own writer has an error of its own for that.
    """
    from safetensors.torch import save

    with partial_file(path.parent, path.name) as partial:
        with partial.open("wb") as file:
            file.write(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
