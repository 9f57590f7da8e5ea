"""What the readers of all checkpoint formats have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
GGUF_MAGIC = b"GGUF"
# What stands in front of a safetensors header, which is a JSON object.
LENGTH_BYTES = 8
_SHARD = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a header: its shape (of values, also where they are packed) and the file format's type name."""

    shape: tuple[int, ...]
    format: str


class TensorFile(Protocol):
    """A file of named tensors, read lazily."""

    path: Path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text fields of the header."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The header."""

    def read(self, name: str) -> Tensor:
        """One tensor in aligned storage of its own; block-quantised types arrive as float32."""


def unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    """The error for a file whose header or size is wrong."""
    return ValueError(f"{path.name} is truncated or is no {kind} file ({error}); download it again.")


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

    def read(self, name: str) -> Tensor:
        """One tensor, from the part that has it."""
        return self._places[name].read(name)


def parts_of(file: TensorFile) -> tuple[TensorFile, ...]:
    """The parts of a model; a file that is no part is the only one."""
    return file.files if isinstance(file, Parts) else (file,)


def open_file(path: Path) -> TensorFile:
    """Open a safetensors or GGUF file by its content.

    Raises FileNotFoundError, or ValueError for a pickle, a truncated file or another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the name and the model folder.")
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES + 1)
    magic = start[: len(GGUF_MAGIC)]
    # The length of a safetensors header may begin like a pickle: 640 bytes are b"\x80\x02".
    pickled = magic.startswith(PICKLE_MAGIC) and start[LENGTH_BYTES:] != b"{"
    if path.suffix.lower() in PICKLE_SUFFIXES or pickled:
        raise ValueError(
            f"{path.name} is a pickle, which can run any program when it is opened; use the model's .safetensors or "
            ".gguf file, or convert it with safetensors.torch.save_file where you trust its source."
        )
    if magic == GGUF_MAGIC or path.suffix.lower() == ".gguf":
        from .gguf_file import GgufFile

        return GgufFile(path)
    from .safetensors_file import SafetensorsFile

    return SafetensorsFile(path)


def open_files(path: Path) -> tuple[TensorFile, ...]:
    """The file, or all shards of a model saved as name-00001-of-00003.safetensors when `path` is one of them.

    Raises FileNotFoundError if a shard is missing.
    """
    shard = _SHARD.match(path.name)
    if shard is None:
        return (open_file(path),)
    count = int(shard[3])
    shards = [path.with_name(f"{shard[1]}-{i:05d}-of-{shard[3]}.safetensors") for i in range(1, count + 1)]
    absent = [s.name for s in shards if not s.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{path.name} is one of {count} parts, and {absent[0]} is not beside it; put all parts in one folder."
        )
    return tuple(open_file(s) for s in shards)
