"""Opening a model file: its format is told by its content, and the parts of a model are found."""

from __future__ import annotations

import re
from pathlib import Path

from .gguf_file import MAGIC as GGUF_MAGIC
from .gguf_file import GgufFile
from .safetensors_file import SafetensorsFile
from .tensor_file import TensorFile

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# A safetensors file may begin with a header length of these two bytes; what follows the length tells.
SAFETENSORS_START = b"{"
_SHARD = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


def open_file(path: Path) -> TensorFile:
    """Open a safetensors or GGUF file by its content.

    Raises FileNotFoundError, or ValueError for a pickle, a truncated file or another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the name and the model folder.")
    with path.open("rb") as file:
        start = file.read(9)
    pickled = start.startswith(PICKLE_MAGIC) and start[8:] != SAFETENSORS_START
    if path.suffix.lower() in PICKLE_SUFFIXES or pickled:
        raise ValueError(
            f"{path.name} is a pickle, which can run any program when it is opened; use the model's .safetensors or "
            ".gguf file, or convert it with safetensors.torch.save_file where you trust its source."
        )
    if start.startswith(GGUF_MAGIC) or path.suffix.lower() == ".gguf":
        return GgufFile(path)
    return SafetensorsFile(path)


def part_paths(path: Path) -> tuple[Path, ...]:
    """The file, or all shards of a model saved as name-00001-of-00003.safetensors when `path` is one of them.

    Raises FileNotFoundError if a shard is missing.
    """
    shard = _SHARD.match(path.name)
    if shard is None:
        return (path,)
    count = int(shard[3])
    parts = tuple(path.with_name(f"{shard[1]}-{i:05d}-of-{shard[3]}.safetensors") for i in range(1, count + 1))
    absent = next((part.name for part in parts if not part.is_file()), None)
    if absent is not None:
        raise FileNotFoundError(
            f"{path.name} is one of {count} parts, and {absent} is not beside it; put all parts in one folder."
        )
    return parts


def open_files(path: Path) -> tuple[TensorFile, ...]:
    """The opened file, or all its parts (see `part_paths`)."""
    return tuple(open_file(part) for part in part_paths(path))
