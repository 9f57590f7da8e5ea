"""Safetensors files: the header without the data, and tensors in storage of their own.

Source: the format's specification (huggingface/safetensors): eight bytes of header length, a JSON header, the data.
Tensors are packed back to back, so views of a mapped file start at any byte; each is read into fresh memory instead,
which torch aligns, and a file larger than main memory can still be inspected.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .tensor_file import LENGTH_BYTES, StoredTensor, unreadable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000
METADATA = "__metadata__"


class SafetensorsFile:
    """One safetensors file. Raises ValueError if it is truncated or is not safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header, self._start = _header(path)
            self.metadata: Mapping[str, str] = header.pop(METADATA, {})
            self._places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            self.tensors: Mapping[str, StoredTensor] = {
                name: StoredTensor(shape=tuple(entry["shape"]), format=entry["dtype"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise unreadable(path, "safetensors", error) from error
        missing = self._start + max((end for _, end in self._places.values()), default=0) - path.stat().st_size
        if missing > 0:
            raise unreadable(path, "safetensors", ValueError(f"{missing} bytes are missing at its end"))

    def read(self, name: str) -> Tensor:
        """The stored tensor, on the CPU, in its stored type."""
        stored = self.tensors[name]
        if stored.format not in DTYPES:
            raise ValueError(
                f"{self.path.name}: tensor '{name}' has the type {stored.format}; use a file whose tensors are "
                f"{', '.join(DTYPES)}."
            )
        begin, end = self._places[name]
        value = torch.empty(stored.shape, dtype=DTYPES[stored.format])
        if value.nbytes != end - begin:
            raise unreadable(self.path, "safetensors", ValueError(f"the size of '{name}' does not fit its shape"))
        if value.nbytes:
            with self.path.open("rb") as file:
                file.seek(self._start + begin)
                file.readinto(value.reshape(-1).view(torch.uint8).numpy())
        return value


def _header(path: Path) -> tuple[dict[str, dict[str, object]], int]:
    """The JSON header, and where the data starts."""
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", prefix)
        if length > LARGEST_HEADER:
            raise ValueError("its header is no header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    return header, LENGTH_BYTES + length
