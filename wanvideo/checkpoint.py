"""A checkpoint: one model's tensors by canonical name, read lazily from one or several files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..quantized.linear import QuantizedLinear
from .gguf_file import GgufFile
from .key_names import Naming, naming_of
from .model_file import open_files
from .stored_formats import FP8_FORMATS, Weight, asks_full_precision, weights_of
from .stored_weights import Stored, layer_of, read_stored, read_weight
from .tensor_file import Parts, TensorFile


class Entry(NamedTuple):
    """Where a tensor is."""

    file: TensorFile
    weight: Weight


class Checkpoint:
    """Tensors under canonical names. Only the header is read until `tensor` is called.

    path: the file it was opened from; metadata: text fields of the header; naming: how the file itself names its keys.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], *, metadata: Mapping[str, str], naming: Naming
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.naming = naming
        self._entries = dict(entries)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: e.weight.shape for n, e in self._entries.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """What `tensor` returns: the stored type, or float32 where a scale or a block format is expanded."""
        return {name: entry.weight.dtype for name, entry in self._entries.items()}

    @cached_property
    def formats(self) -> Mapping[str, str]:
        """How the file stores each tensor, e.g. "BF16", "F8_E4M3 scaled", "NVFP4", "GGUF Q8_0"."""
        return {name: entry.weight.format for name, entry in self._entries.items()}

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the tensors that are stored in fewer bits than bfloat16."""
        return tuple(name for name, entry in self._entries.items() if entry.weight.quantized)

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """Those that the tensors are in, the main one first."""
        return tuple(dict.fromkeys(entry.file for entry in self._entries.values()))

    def file_of(self, name: str) -> TensorFile:
        """Where the tensor `name` is."""
        return self._entries[name].file

    @property
    def asking_full_precision(self) -> tuple[str, ...]:
        """Names of the files whose `scaled_fp8` mark asks for products in base precision."""
        return tuple(file.path.name for file in self.files if asks_full_precision(file))

    @property
    def file_with_fp8(self) -> str | None:
        """The name of one that holds weights in FP8, or in formats with scales in FP8."""
        kinds = (*FP8_FORMATS, "NVFP4", "MXFP8")
        name = next((name for name, form in self.formats.items() if form.startswith(kinds)), None)
        return None if name is None else self.file_of(name).path.name

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def tensor(self, name: str, *, mapped: bool = False) -> Tensor:
        """The tensor `name` on the CPU, in aligned storage of its own, quantized forms expanded to float32.

        mapped: see `TensorFile.read`.
        """
        entry = self._entries[name]
        return read_weight(entry.file, entry.weight, mapped=mapped)

    def stored(self, name: str) -> Stored:
        """The tensor and its scales as the file holds them."""
        return read_stored(*self._entries[name])

    def layer(
        self, name: str, shape: Sequence[int], bias: Tensor | None, *, fast: torch.device | None = None
    ) -> QuantizedLinear:
        """The layer of a quantized weight; see `stored_weights.layer_of`."""
        entry = self._entries[name]
        return layer_of(self.stored(name), entry.weight, shape, bias, fast=fast)

    def array(self, name: str) -> list[str | int | float | bool]:
        """An array of a GGUF header, such as a vocabulary; empty where there is none of this name."""
        return next((found for file in self.files if isinstance(file, GgufFile) and (found := file.array(name))), [])

    def full_precision(self, name: str) -> bool:
        """Whether the file asks that products with this weight are computed in base precision."""
        return self._entries[name].weight.mark.full_precision

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same tensors under other names."""
        entries = {rename(name): entry for name, entry in self._entries.items()}
        return type(self)(self.path, entries, metadata=self.metadata, naming=self.naming)

    def chosen(self, wanted: Callable[[str], bool]) -> Self:
        """Only the tensors whose names are wanted."""
        entries = {name: entry for name, entry in self._entries.items() if wanted(name)}
        return type(self)(self.path, entries, metadata=self.metadata, naming=self.naming)

    def joined(self, others: Sequence[Checkpoint]) -> Self:
        """This checkpoint and modules that belong to it, as one.

        Raises ValueError, naming both files, if two bring the same tensor.
        """
        entries = dict(self._entries)
        for other in others:
            both = next((name for name in other.shapes if name in entries), None)
            if both is not None:
                raise ValueError(
                    f"{other.path.name} brings '{both}', which {entries[both].file.path.name} has already; leave one "
                    "of the two out."
                )
            entries |= other._entries
        return type(self)(self.path, entries, metadata=self.metadata, naming=self.naming)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the header of a safetensors or GGUF file, or of all parts of a file saved in parts.

    Keys of a Wan transformer become canonical (key_names.py); those of other models stay as the file has them.
    Raises FileNotFoundError, or ValueError for a pickle, a truncated, ambiguous or unreadable file.
    """
    return checkpoint_of(path, open_files(path))


def checkpoint_of(path: Path, files: Sequence[TensorFile]) -> Checkpoint:
    """The tensors of a file, or of the files of one that was saved in parts. Raises as `open_checkpoint`."""
    file = files[0] if len(files) == 1 else Parts(files)
    naming = naming_of(list(file.tensors), name=path.name)
    entries: dict[str, Entry] = {}
    for name, weight in weights_of(file).items():
        canonical = naming.canonical(name)
        if canonical in entries:
            raise ValueError(f"{path.name} has the tensor '{canonical}' twice; download it again.")
        entries[canonical] = Entry(file, weight)
    return Checkpoint(path, entries, metadata=file.metadata, naming=naming)
