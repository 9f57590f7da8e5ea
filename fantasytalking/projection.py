"""The part of a FantasyTalking module that runs once, beside the transformer: features of speech to context tokens.

Source: Fantasy-AMAP/fantasy-talking (AudioProjModel). Module names are the published checkpoint keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..wanvideo.checkpoint import open_checkpoint
from ..wanvideo.load_plan import ModuleFile
from ..wanvideo.modules.layers import WanLayerNorm
from ..wanvideo.own_model import OwnModel, load_own, open_own
from ..wanvideo.systems import Systems
from .extension import PROJECTION, FantasyTalking

if TYPE_CHECKING:
    from ..host import Host

WEIGHT = f"{PROJECTION}proj.weight"


class AudioProjModel(nn.Module):
    """Features of a speech encoder to the width of context tokens."""

    def __init__(self, features: int, context_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, context_dim, bias=False)
        self.norm = WanLayerNorm(context_dim, eps=1e-5, elementwise_affine=True)

    def forward(self, features: Tensor) -> Tensor:
        """[N, features] -> [N, A]."""
        return self.norm(self.proj(features.to(self.proj.weight.dtype)))


@dataclass(frozen=True)
class FantasyTalkingModel(ModuleFile):
    """A FantasyTalking module (socket FANTASYTALKINGMODEL): the transformer reads its blocks, own is the projection."""

    own: OwnModel = field(kw_only=True, compare=False)

    @property
    def features(self) -> int:
        """Channels of the speech encoder that it was trained with."""
        return self.own.module["proj_model"].proj.in_features

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Features of speech [N, features] -> context tokens [1, N, A] float32 on the CPU."""
        device = self.own.managed.acquire()
        try:
            return self.own.module["proj_model"](features.to(device))[None].float().cpu()
        finally:
            self.own.managed.release()


def load_fantasytalking(path: Path, *, dtype: torch.dtype, host: Host, systems: Systems) -> FantasyTalkingModel:
    """Load the projection, and name the file for the transformer. Raises ValueError for another kind of file."""
    checkpoint = open_checkpoint(path)
    if WEIGHT not in checkpoint.shapes:
        checkpoint = open_own(path, FantasyTalking.file, systems)
    context_dim, features = checkpoint.shapes[WEIGHT]
    with torch.device("meta"):
        module = nn.ModuleDict({"proj_model": AudioProjModel(features, context_dim)})
    managed = load_own(
        module,
        checkpoint.chosen(lambda key: not key.startswith("blocks.")),
        what=FantasyTalking.file.name,
        plan_of=lambda name: None,
        dtype_of=lambda name: dtype,
        host=host,
    )
    return FantasyTalkingModel(path, FantasyTalking.file, own=OwnModel(path, (str(dtype),), managed))
