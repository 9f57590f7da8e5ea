"""Headers of published files that are not downloaded yet, made of the sizes of their models.

`wanvideo plan` answers with them before anything is fetched. Which model a file is, its name tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from ..host import StandaloneHost
from ..wanvideo.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from ..wanvideo.loading import quantizable
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tensor_file import StoredTensor
from .published_models import Model, model_named

# What is behind the name of the model in that of a file: how blocks are stored, and the rest.
STORAGES = (
    ("Q8", "GGUF Q8_0", "F16"), ("fp8_e5m2", "F8_E5M2", "F16"), ("fp8", "F8_E4M3", "F16"), ("fp32", "F32", "F32"),
    ("fp16", "F16", "F16"), ("", "BF16", "BF16"),
)  # fmt: skip
NAME = re.compile(r"(.+?)(?:[-_](Q8(?:_0)?|fp8_\w+|fp32|fp16|bf16))?\.(?:safetensors|gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """The header of a file (`TensorFile`) that is not there."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(f"There is no file {self.path} to read '{name}' from; download it first.")


class PlanningHost(StandaloneHost):
    """Finds also files that are not there yet, where a plan may know their headers."""

    def find_file(self, kind: str, name: str) -> Path:
        """The file, or where it would lie. Raises ValueError for a name that leaves the folder."""
        try:
            return super().find_file(kind, name)
        except FileNotFoundError:
            base = _base(name)
            others = [other for other in self.list_files(kind) if _base(other) == base]
            return super().find_file(kind, others[0]) if len(others) == 1 else self.models_dir(kind) / base


def is_known(path: Path) -> bool:
    """Whether the header can be told: the file is there, or its name is that of a published model."""
    return path.is_file() or _model(path.name) is not None


def open_or_make(path: Path) -> Checkpoint:
    """The checkpoint of a file, or of the published one of this name. Raises as `open_checkpoint`."""
    model = None if path.is_file() else _model(path.name)
    if model is None:
        return open_checkpoint(path)
    storage = NAME.fullmatch(path.name)[2] or ""
    _, blocks, rest = next(row for row in STORAGES if storage.lower().startswith(row[0].lower()))
    tensors = {
        name: StoredTensor(shape=shape, format=blocks if quantized else rest)
        for name, shape, quantized in _tensors(model)
    }
    return checkpoint_of(path, (Header(path, tensors),))


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _model(name: str) -> Model | None:
    parts = NAME.fullmatch(name)
    return None if parts is None else model_named(parts[1])


@lru_cache(maxsize=4)
def _tensors(model: Model) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """Names and shapes, and whether the weight is one that is stored in few bits."""
    return tuple(_all_tensors(model))


def _all_tensors(model: Model) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    with torch.device("meta"):
        whole = WanModel(model.config, model.extensions)
    layers = {
        f"{name}.weight" for name, layer in whole.named_modules()
        if isinstance(layer, nn.Linear) and quantizable(whole, name)
    }  # fmt: skip
    for name, parameter in whole.named_parameters():
        if model.holds(name):
            yield name, tuple(parameter.shape), name in layers
    for name, shape in model.own:
        yield name, shape, False
