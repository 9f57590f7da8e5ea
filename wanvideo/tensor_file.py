"""What the readers of all checkpoint formats have in common."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..tensor_layout import ALIGNMENT

# Dimensions and sizes beyond this are no model's, and their products would leave what torch can address.
LARGEST_SIZE = 2**48
# A system has 65,530 mappings for a process.
LEAST_MAPPED = 2**20
# What cannot be mapped is read by several threads, a stretch of this many bytes at a time.
STRETCH, READERS = 2**23, 8


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a header: its shape (of values, also where they are packed) and the file format's type name."""

    shape: tuple[int, ...]
    format: str


class TensorFile(Protocol):
    """A file of named tensors, read lazily. Its header was checked against its size when it was opened."""

    path: Path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text fields of the header."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The header."""

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor at an aligned address; GGUF blocks as bytes, uint8 [rows, bytes of a row].

        A large one is a view of the file, which all processes share and which takes no memory that the system could
        not take back, unless it lies at another address there. mapped: any that can be is a view, aligned or not, for
        what is converted at once and let go.
        """


def unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    """The error for a file whose header or size is wrong."""
    # A damaged header may have put anything into the reason.
    reason = "".join(character if character.isprintable() else "?" for character in str(error))
    return ValueError(f"{path.name} is truncated or is no {kind} file ({reason}); download it again.")


def check_name(name: str) -> None:
    """Raise ValueError for a tensor's name that no message could show: with line breaks, or no text at all."""
    if not name.isprintable():
        raise ValueError("a tensor's name has characters that cannot be shown")


def element_count(name: str, shape: Sequence[object]) -> int:
    """The number of values of a shape. Raises ValueError unless all its sizes are whole numbers of a possible size."""
    count = 1
    for size in shape:
        # A bool is an int to Python, and `true` no size.
        if type(size) is not int or not 0 <= size <= LARGEST_SIZE:
            raise ValueError(f"the shape of '{name}' is not made of whole numbers")
        count *= size
        if count > LARGEST_SIZE:
            raise ValueError(f"'{name}' has a shape of too many values")
    return count


def byte_range(name: str, offsets: object) -> tuple[int, int]:
    """First byte and the byte behind the last. Raises ValueError for anything but two ascending whole numbers."""
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise ValueError(f"the offsets of '{name}' are not two whole numbers")
    begin, end = offsets
    if not 0 <= begin <= end <= LARGEST_SIZE:
        raise ValueError(f"the offsets of '{name}' are no range of bytes")
    return begin, end


def read_bytes(path: Path, begin: int, shape: Sequence[int], dtype: torch.dtype, *, mapped: bool = False) -> Tensor:
    """A tensor whose bytes start at `begin`, mapped or read into fresh memory: see `TensorFile.read`.

    Raises ValueError where the file has become shorter since its header was checked.
    """
    size = math.prod(shape) * dtype.itemsize
    least, step = (1, dtype.itemsize) if mapped else (LEAST_MAPPED, ALIGNMENT)
    if size >= least and begin % step == 0:
        return _mapped(path, begin, size, dtype).view(tuple(shape))
    value = torch.empty(tuple(shape), dtype=dtype)
    if not size:
        return value
    memory = memoryview(value.reshape(-1).view(torch.uint8).numpy())
    if size <= STRETCH:
        got = _read_into(memory, path, begin)
    else:
        # Half of the time is the system's, which finds fresh memory page by page.
        starts = range(0, size, STRETCH)
        with ThreadPoolExecutor(READERS) as pool:
            got = sum(pool.map(lambda at: _read_into(memory[at : at + STRETCH], path, begin + at), starts))
    if got != size:
        raise _shorter(path)
    return value


def _read_into(memory: memoryview, path: Path, begin: int) -> int:
    with path.open("rb") as file:
        file.seek(begin)
        return file.readinto(memory)


def _mapped(path: Path, begin: int, size: int, dtype: torch.dtype) -> Tensor:
    # Of this stretch alone, so that what was read of the file does not count as this process's memory.
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < begin + size:
            raise _shorter(path)
        # A private copy of what is written, though nobody writes: torch warns of memory that it could not write to.
        memory = mmap.mmap(file.fileno(), begin + size - start, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=begin - start)


def _shorter(path: Path) -> ValueError:
    return ValueError(f"{path.name} became shorter while it was read; download it again.")


class Parts:
    """All parts of one model as one file: a weight and its scale may be in different ones.

    Raises ValueError if two parts hold the same tensor.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.path, self.files = files[0].path, tuple(files)
        self.metadata: Mapping[str, str] = {k: v for file in reversed(files) for k, v in file.metadata.items()}
        self._places: dict[str, TensorFile] = {}
        for file in files:
            both = next((name for name in file.tensors if name in self._places), None)
            if both is not None:
                raise ValueError(
                    f"{file.path.name} and {self._places[both].path.name} both hold '{both}'; download the model again."
                )
            self._places |= dict.fromkeys(file.tensors, file)
        self.tensors: Mapping[str, StoredTensor] = {name: file.tensors[name] for name, file in self._places.items()}

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor, from the part that has it."""
        return self._places[name].read(name, mapped=mapped)


def parts_of(file: TensorFile) -> tuple[TensorFile, ...]:
    """The parts of a model; a file that is no part is the only one."""
    return file.files if isinstance(file, Parts) else (file,)
