"""Enhance-A-Video (Luo et al. 2025): self-attention is amplified by how much frames attend to each other.

The score is measured between the same place in different frames, as published. It has no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import Grid, Heads, HeadsRead, ModelInputs, Tokens, video_tokens


@dataclass(frozen=True)
class EnhanceArgs(Payload):
    """Socket FETAARGS: weight, and the part of the steps (0..1) in which it acts."""

    weight: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    needs: ClassVar[str] = "Enhance-A-Video works with every Wan model; this one was built without extensions."


class EnhanceCond(NamedTuple):
    """weight, 0-d; token grid of the video; score [B, 1, 1] once self-attention measured it; shard: of the tokens."""

    weight: Tensor
    grid: Grid
    score: Tensor | None = None
    shard: Shard = WHOLE


def frame_score(q: Tensor, k: Tensor, frames: int, weight: Tensor, shard: Shard = WHOLE) -> Tensor:
    """Gain [B, 1, 1] >= 1 from post-RoPE q, k [B, frames * places, H, D] of this part of the places.

    The mean attention between different frames at one place, over all places and heads, times (frames + weight).
    """
    q, k = (t.unflatten(1, (frames, -1)).permute(0, 2, 3, 1, 4) for t in (q, k))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = scores.float().softmax(dim=-1)
    across = weights.sum(dim=(-1, -2)) - weights.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    mean = shard.mean(across.mean(dim=(1, 2))) / (frames * (frames - 1))
    return (mean * (frames + weight)).clamp(min=1).view(-1, 1, 1)


@dataclass(frozen=True)
class EnhanceAVideo(Extension):
    """Present in every model, idle without its payload."""

    payload: ClassVar[type] = EnhanceArgs
    weightless: ClassVar[bool] = True

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Needs no weights."""
        return cls()

    def prepare(
        self, model: WanModel, payload: EnhanceArgs, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, EnhanceCond | None]:
        """Idle outside its steps, at weight 0 and for a single frame."""
        acts = inputs.step.within(payload.start_percent, payload.end_percent)
        if not acts or tokens.grid[0] == 1 or payload.weight == 0:
            return tokens, None
        weight = torch.tensor(float(payload.weight), device=tokens.x.device)
        return tokens, EnhanceCond(weight, tokens.grid)

    def on(self, state: EnhanceCond, shard: Shard) -> EnhanceCond:
        """The score is one for all places, so that it needs the shard."""
        return state._replace(grid=shard.grid(state.grid), shard=shard)

    def reads_heads(self, cond: EnhanceCond) -> HeadsRead:
        """Queries and keys of the video, and not what they give."""
        count = video_tokens(cond.grid)
        return HeadsRead(count, count, result=False)

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: EnhanceCond) -> tuple[Heads, EnhanceCond]:
        """Measures the score."""
        count = video_tokens(cond.grid)
        score = frame_score(heads.q[:, :count], heads.k[:, :count], cond.grid[0], cond.weight, cond.shard)
        return heads, cond._replace(score=score)

    def self_attn_output(self, block: WanAttentionBlock, y: Tensor, cond: EnhanceCond) -> tuple[Tensor, EnhanceCond]:
        """Amplifies the projected output."""
        return (y * cond.score).to(y.dtype), cond


EXTENSION = EnhanceAVideo
