"""Safetensors files: the header without the data, and tensors in storage of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .tensor_file import StoredTensor, unreadable

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


class SafetensorsFile:
    """One safetensors file.

    The format packs tensors back to back, so views of the mapped file start at any byte; `read` copies each into fresh
    memory, which torch aligns. Raises ValueError if the file is truncated or is not safetensors.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise unreadable(path, "safetensors", error) from error

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The text fields of the header."""
        return dict(self._handle.metadata() or {})

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shape and type of every tensor, from the header."""
        names = self._handle.keys()
        slices = {name: self._handle.get_slice(name) for name in names}
        return {n: StoredTensor(shape=tuple(s.get_shape()), format=s.get_dtype()) for n, s in slices.items()}

    def read(self, name: str) -> Tensor:
        """The stored tensor, on the CPU, in its stored type."""
        stored = self.tensors[name]
        if stored.format not in DTYPES:
            raise ValueError(
                f"{self.path.name}: tensor '{name}' has the type {stored.format}; use a file whose tensors are "
                f"{', '.join(DTYPES)}."
            )
        return self._handle.get_tensor(name).clone(memory_format=torch.contiguous_format)
