"""From features of a face's motion to the tokens that a FantasyPortrait transformer attends to.

Source: Fantasy-AMAP/fantasy-portrait (PortraitAdapter), whose resampler is Flamingo's (Alayrac et al. 2022). Module
names are the published checkpoint keys.
Shapes: N pixel frames, C channels of a resampler, A channels of motion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.assign import layer_count
from ..wanvideo.checkpoint import Checkpoint, open_checkpoint
from ..wanvideo.load_plan import ModuleFile
from ..wanvideo.modules.layers import WanLayerNorm
from ..wanvideo.own_model import OwnModel, load_own, open_own
from ..wanvideo.systems import Systems
from .extension import PROJECTIONS, FantasyPortrait

if TYPE_CHECKING:
    from ..host import Host

HEAD_SIZE = 64
NORM_EPS = 1e-5
# What a frame's features are made of, in this order: their names in the file and their channels.
PARTS = {"headpose": 6, "eye": 6, "emo": 30, "mouth": 512}


class Strengths(NamedTuple):
    """Factors of the tokens of all parts together, of the mouth's own and of the expression's own."""

    adapter: float = 1.0
    mouth: float = 1.0
    emo: float = 1.0


class MultiProjModel(nn.Module):
    """One token for each part of a frame's features."""

    def __init__(self, context_dim: int) -> None:
        super().__init__()
        for name, channels in PARTS.items():
            self.add_module(f"{name}_proj", nn.Linear(channels, context_dim, bias=False))
        self.norm = WanLayerNorm(context_dim, eps=NORM_EPS, elementwise_affine=True)

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """[N, channels] of each part -> [N, 4, A]."""
        return torch.stack([self.norm(self.get_submodule(f"{name}_proj")(parts[name])) for name in PARTS], dim=1)


class PerceiverAttention(nn.Module):
    """Learned queries attend to what is read and to themselves."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.heads = (inner_dim // HEAD_SIZE, HEAD_SIZE)
        self.attention = sdpa()
        self.norm1 = WanLayerNorm(dim, eps=NORM_EPS, elementwise_affine=True)
        self.norm2 = WanLayerNorm(dim, eps=NORM_EPS, elementwise_affine=True)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x [N, 1, C], queries [N, Q, C] -> [N, Q, C]."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat((self.norm1(x), latents), dim=1)).unflatten(-1, (2, *self.heads)).unbind(2)
        return self.to_out(self.attention(self.to_q(latents).unflatten(-1, self.heads), k, v).flatten(2))


class Resampler(nn.Module):
    """A frame's features of one part to several tokens."""

    def __init__(self, *, features: int, dim: int, inner_dim: int, hidden_dim: int, queries: int, context_dim: int,
                 depth: int) -> None:  # fmt: skip
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, queries, dim))
        self.proj_in = nn.Linear(features, dim)
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = WanLayerNorm(context_dim, eps=NORM_EPS, elementwise_affine=True)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(dim, inner_dim), _feed_forward(dim, hidden_dim))) for _ in range(depth)
        )

    @classmethod
    def of(cls, prefix: str, checkpoint: Checkpoint) -> Resampler:
        """With the sizes of the file's tensors that begin with `prefix`."""
        shapes = checkpoint.shapes
        dim, features = shapes[f"{prefix}proj_in.weight"]
        return cls(
            features=features,
            dim=dim,
            inner_dim=shapes[f"{prefix}layers.0.0.to_q.weight"][0],
            hidden_dim=shapes[f"{prefix}layers.0.1.1.weight"][0],
            queries=shapes[f"{prefix}latents"][1],
            context_dim=shapes[f"{prefix}proj_out.weight"][0],
            depth=layer_count(shapes, f"{prefix}layers."),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[N, channels] -> [N, Q, A]."""
        latents = self.latents.expand(features.shape[0], -1, -1)
        x = self.proj_in(features)[:, None]
        for attention, feed_forward in self.layers:
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))


def _feed_forward(dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(
        WanLayerNorm(dim, eps=NORM_EPS, elementwise_affine=True),
        nn.Linear(dim, hidden_dim, bias=False),
        nn.GELU(),
        nn.Linear(hidden_dim, dim, bias=False),
    )


class PortraitAdapter(nn.Module):
    """Features of a face's motion to tokens: one for each part, and more for mouth and expression."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.proj_model = MultiProjModel(checkpoint.shapes["proj_model.norm.weight"][0])
        self.mouth_proj_model = Resampler.of("mouth_proj_model.", checkpoint)
        self.emo_proj_model = Resampler.of("emo_proj_model.", checkpoint)

    def forward(self, features: Tensor, strengths: Strengths) -> Tensor:
        """[N, 554] -> [1, N * tokens a frame, A]."""
        features = features.to(self.proj_model.norm.weight.dtype)
        split = features.split(tuple(PARTS.values()), dim=-1)
        parts = {name: part.contiguous() for name, part in zip(PARTS, split, strict=True)}
        tokens = (
            self.proj_model(parts) * strengths.adapter,
            self.mouth_proj_model(parts["mouth"]) * strengths.mouth,
            self.emo_proj_model(parts["emo"]) * strengths.emo,
        )
        return torch.cat(tokens, dim=1).flatten(0, 1)[None]


@dataclass(frozen=True)
class FantasyPortraitModel(ModuleFile):
    """A FantasyPortrait module (socket FANTASYPORTRAITMODEL): the transformer reads its blocks, own is the rest."""

    own: OwnModel = field(kw_only=True, compare=False)

    @torch.no_grad()
    def project(self, features: Tensor, strengths: Strengths) -> Tensor:
        """Features of motion [N, 554] -> tokens [1, N * tokens a frame, A] float32 on the CPU."""
        device = self.own.managed.acquire()
        try:
            return self.own.module(features.to(device), strengths).float().cpu()
        finally:
            self.own.managed.release()


def load_fantasyportrait(path: Path, *, dtype: torch.dtype, host: Host, systems: Systems) -> FantasyPortraitModel:
    """Load the projections, and name the file for the transformer. Raises ValueError for another kind of file."""
    checkpoint = open_checkpoint(path)
    if not any(name.startswith(PROJECTIONS[1]) for name in checkpoint.shapes):
        checkpoint = open_own(path, FantasyPortrait.file, systems)
    checkpoint = checkpoint.chosen(lambda name: name.startswith(PROJECTIONS))
    try:
        with torch.device("meta"):
            module = PortraitAdapter(checkpoint)
    except KeyError as error:
        raise ValueError(f"{path.name} lacks {error} of a {FantasyPortrait.file.name}; download it again.") from error
    managed = load_own(
        module,
        checkpoint,
        what=FantasyPortrait.file.name,
        plan_of=lambda name: None,
        dtype_of=lambda name: dtype,
        host=host,
    )
    return FantasyPortraitModel(path, FantasyPortrait.file, own=OwnModel(path, (str(dtype),), managed))
