"""Headers of published files that are not downloaded yet, made of the sizes of their models.

`wanvideo plan` answers with them before anything is fetched. Which model a file is, its name tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from ..clip_image.extension import ClipImageExtension
from ..host import StandaloneHost
from ..multitalk.extension import MultiTalk
from ..vace.extension import VaceExtension
from ..wanvideo.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from ..wanvideo.config import PUBLISHED_CONFIGS, WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.loading import quantizable
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tensor_file import StoredTensor

SMALL, LARGE = PUBLISHED_CONFIGS["1.3B"], PUBLISHED_CONFIGS["14B"]
# 16 channels of pictures and 4 of their mask.
WITH_PICTURES = replace(LARGE, in_dim=36)
CLIP = ClipImageExtension(clip_dim=1280)
BOTH_ENDS = ClipImageExtension(clip_dim=1280, positions=514)
# InfiniteTalk hears the twelve layers of wav2vec2-base.
SPEECH = MultiTalk(features=12 * 768, intermediate_dim=512, context_tokens=32, output_dim=768, voiced=tuple(range(40)))


@dataclass(frozen=True)
class Model:
    """A published transformer with its systems. module: the one system whose weights alone are the file."""

    config: WanConfig
    extensions: tuple[Extension, ...] = ()
    module: Extension | None = None


T2V_SMALL, T2V, T2V_FIVE = Model(SMALL), Model(LARGE), Model(PUBLISHED_CONFIGS["5B"])
I2V, I2V_TWO_MODELS = Model(WITH_PICTURES, (CLIP,)), Model(WITH_PICTURES)
# What a file of this name is; models that were trained on have the shapes of those that they began as.
MODELS = (
    (r"wan2\.1_t2v_1\.3B_(fp16|bf16)\.safetensors", T2V_SMALL),
    (r"Wan2_1-T2V-1[-_]3B(-EchoShot)?_(fp16|bf16|fp32)\.safetensors", T2V_SMALL),
    (r"wan2\.2_ti2v_5B_fp16\.safetensors", T2V_FIVE),
    (r"Wan2_2-TI2V-5B(-\w+)?_(fp16|bf16)\.safetensors", T2V_FIVE),
    (r"Wan2_1-T2V-14B(-Phantom)?_fp8_(e4m3fn|e5m2)(_scaled_KJ)?\.safetensors", T2V),
    (r"Wan2_2-T2V-A14B-(HIGH|LOW)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", T2V),
    (r"Wan2_1-I2V-14B-(480p|720p|MAGREF)_fp8_(e4m3fn|e5m2)(_scaled_KJ)?\.safetensors", I2V),
    (r"Wan2_1-Wan-I2V-ATI-14B_fp8_e4m3fn\.safetensors", I2V),
    (r"Wan2_1-FLF2V-14B-720P_fp8_e4m3fn\.safetensors", Model(WITH_PICTURES, (BOTH_ENDS,))),
    (r"wan2\.1-i2v-14b-480p-Q8_0\.gguf", I2V),
    (r"Wan2_2-I2V-A14B-(HIGH|LOW)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", I2V_TWO_MODELS),
    (r"Wan21[-_]SkyReelsV3-A2V_fp8_scaled_mixed\.safetensors", Model(WITH_PICTURES, (CLIP, SPEECH))),
    (r"Wan2_1-InfiniteTalk_(Single|Multi)_Q8\.gguf", Model(LARGE, (SPEECH,), SPEECH)),
    (
        r"Wan2_1-InfiniteTalk-(Single|Multi)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors",
        Model(LARGE, (SPEECH,), SPEECH),
    ),
    *(
        (rf"Wan2_1-VACE_module_{size}_(fp8_e4m3fn|bf16|fp16)\.safetensors", Model(config, (system,), system))
        for size, config, system in (("14B", LARGE, VaceExtension(8)), ("1_3B", SMALL, VaceExtension(15)))
    ),
)
# How blocks are stored, and the rest, by what the name says.
STORAGES = (
    ("Q8", "GGUF Q8_0", "F16"), ("fp8_e5m2", "F8_E5M2", "F16"), ("fp8", "F8_E4M3", "F16"), ("fp32", "F32", "F32"),
    ("bf16", "BF16", "BF16"), ("fp16", "F16", "F16"),
)  # fmt: skip


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
    _, blocks, rest = next(row for row in STORAGES if row[0] in path.name)
    tensors = {
        name: StoredTensor(shape=shape, format=blocks if quantized else rest)
        for name, shape, quantized in _tensors(model)
    }
    return checkpoint_of(path, (Header(path, tensors),))


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _model(name: str) -> Model | None:
    return next((model for pattern, model in MODELS if re.fullmatch(pattern, name, re.IGNORECASE)), None)


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
        if model.module is None or model.module.owns(name):
            yield name, tuple(parameter.shape), name in layers
