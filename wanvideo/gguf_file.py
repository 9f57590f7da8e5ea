"""GGUF files: header, and tensors expanded to dense values.

Source: ggml's GGUF specification; the extra field with the shape of tensors of five dimensions is city96's
(ComfyUI-GGUF). Q8_0 is a float16 scale and 32 int8 values a block; value = scale * int, computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .tensor_file import StoredTensor, unreadable

if TYPE_CHECKING:
    from gguf import ReaderField, ReaderTensor

READABLE = ("F32", "F16", "BF16", "Q8_0")
Q8_0_BLOCK = 32
Q8_0_SCALE_BYTES = 2
SHAPE_FIELD = "comfy.gguf.orig_shape."


class GgufFile:
    """One GGUF file. Raises ValueError if it is truncated or is not GGUF, ImportError without the gguf package."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise unreadable(path, "GGUF", error) from error
        self._by_name = {t.name: t for t in self._reader.tensors}

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The scalar fields of the header as text."""
        fields = self._reader.fields.items()
        return {name: str(field.contents()) for name, field in fields if len(field.data) == 1}

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shape and type of every tensor, from the header."""
        return {n: StoredTensor(shape=self._shape(t), format=t.tensor_type.name) for n, t in self._by_name.items()}

    def _shape(self, tensor: ReaderTensor) -> tuple[int, ...]:
        field: ReaderField | None = self._reader.fields.get(SHAPE_FIELD + tensor.name)
        if field is not None:
            return tuple(int(field.parts[index][0]) for index in field.data)
        return tuple(int(size) for size in reversed(tensor.shape))

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU: F32, F16 and BF16 as stored, Q8_0 as float32.

        Raises ValueError for any other type.
        """
        stored, data = self.tensors[name], self._by_name[name].data
        if stored.format not in READABLE:
            raise ValueError(
                f"{self.path.name}: tensor '{name}' has the GGUF type {stored.format}, which this version cannot "
                f"read; use a file in {', '.join(READABLE)}."
            )
        values = torch.from_numpy(np.array(data))
        if stored.format == "BF16":
            values = values.view(torch.uint8).flatten().view(torch.bfloat16)
        elif stored.format == "Q8_0":
            values = dequantise_q8_0(values.flatten())
        return values.reshape(stored.shape)


def dequantise_q8_0(blocks: Tensor) -> Tensor:
    """Bytes of Q8_0 blocks, uint8 [n * 34] -> float32 [n * 32]."""
    blocks = blocks.view(-1, Q8_0_SCALE_BYTES + Q8_0_BLOCK)
    scale = blocks[:, :Q8_0_SCALE_BYTES].contiguous().view(torch.float16).float()
    values = blocks[:, Q8_0_SCALE_BYTES:].contiguous().view(torch.int8).float()
    return values.mul_(scale).flatten()
