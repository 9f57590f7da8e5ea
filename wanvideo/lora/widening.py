"""LoRAs that let a model read more channels: their patch embedding is wider than the model's.

Control LoRAs (spacepxl's, for Wan 2.1) read a control video behind the noise. The base model gets zeros for the new
channels and the LoRA runs beside the weights, never merged, as it works only in the steps that have something to read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from ..config import PATCH_SIZE, WanConfig
from .file import LoraFile
from .names import LayerNames
from .reading import open_lora

log = logging.getLogger("wanvideo")

LAYER = "patch_embedding"


def channels_of(file: LoraFile) -> int | None:
    """Channels that the file's change of the patch embedding reads; None where it has none. Reads the header."""
    if not file.selects(LAYER) or file.claims(LAYER):
        return None
    source, names = open_lora(file.path), LayerNames((LAYER,))
    for group in source.groups.values():
        key = group.keys.get("down") or group.keys.get("diff")
        if key is not None and names.find(group.layer) == LAYER:
            _, *inputs = source.file.tensors[key].shape
            return math.prod(inputs) // math.prod(PATCH_SIZE)
    return None


def marked(files: Sequence[LoraFile], config: WanConfig) -> tuple[tuple[LoraFile, ...], int]:
    """The files, those that widen the model marked and not to be merged; and the channels that the model reads then.

    Raises ValueError for two of different width, or where the model reads more than noise already.
    """
    widths = [channels_of(file) or 0 for file in files]
    wide = {file.path.name: width for file, width in zip(files, widths, strict=True) if width > config.in_dim}
    if not wide:
        return tuple(files), config.in_dim
    name, channels = next(iter(wide.items()))
    if config.condition_channels:
        raise ValueError(
            f"{name} is a control LoRA: it reads {channels} channels where this model reads {config.in_dim} already; "
            "load a text-to-video model, or leave the LoRA out."
        )
    other = next((other for other, width in wide.items() if width != channels), None)
    if other is not None:
        raise ValueError(f"{name} reads {channels} channels but {other} {wide[other]}; leave one of the two out.")
    log.info("%s: a control LoRA, which reads %d channels; it runs beside the weights.", ", ".join(wide), channels)
    return tuple(
        replace(file, merge=False, widens=True) if width > config.in_dim else file
        for file, width in zip(files, widths, strict=True)
    ), channels


def refuse_wide(files: Sequence[LoraFile], config: WanConfig) -> None:
    """Raises ValueError for a file that would have to widen a model that is loaded already."""
    for file in files:
        if (channels_of(file) or 0) > config.in_dim:
            raise ValueError(
                f"{file.path.name} is a control LoRA, whose patch embedding reads more channels than the model that is "
                "loaded: connect it to WanVideoModelLoader."
            )


def widen(patch_embedding: nn.Conv3d, channels: int) -> None:
    """Let a patch embedding read more channels, in place; those that it did not know count for nothing."""
    more = channels - patch_embedding.in_channels
    patch_embedding.weight.data = F.pad(patch_embedding.weight.data, (*(0, 0) * 3, 0, more))
    patch_embedding.in_channels = channels
