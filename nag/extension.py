"""Normalized attention guidance (Chen et al. 2025): text attention is pushed away from a negative prompt.

In every text cross-attention, the output for the prompt is extrapolated away from that for the negative prompt, held to
a multiple of its own size, and blended in. It costs no second pass, and works where CFG is off.
Source: ChenDarYen/Normalized-Attention-Guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import CrossAttention, ModelInputs, TextSource, Tokens


class Strength(NamedTuple):
    """0-d tensors. scale: of the extrapolation; tau: how many times larger it may be; alpha: its share."""

    scale: Tensor
    tau: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class NegativeText(Payload):
    """What WanVideoApplyNAG adds to text embeds.

    prompts: negative ones, [tokens, text_dim] each, attended to together. inplace: less memory, other rounding.
    """

    prompts: tuple[Tensor, ...]
    scale: Tensor
    tau: Tensor
    alpha: Tensor
    inplace: bool = True
    needs: ClassVar[str] = "Normalized attention guidance works with every Wan model; this one has no text layers."

    def without(self, names: frozenset[str]) -> Self | None:
        """Passes without the prompt have nothing to be pushed away."""
        return None if "text" in names else self


def guided(positive: Tensor, negative: Tensor, strength: Strength, *, inplace: bool) -> Tensor:
    """Attention to the prompt and to the negative prompt, [B, L, C], combined. inplace: `negative` is overwritten.

    Sizes are L1 norms over all channels, in float32 at least.
    """
    scale, tau, alpha = strength
    if inplace:
        pushed = negative.sub_(positive).mul_(1 - scale).add_(positive)
    else:
        pushed = positive * scale - negative * (scale - 1)
    size, pushed_size = _size(positive), _size(pushed)
    ratio = (pushed_size / size).nan_to_num(nan=10.0)
    held = torch.where(ratio > tau, size * tau / (pushed_size + 1e-7), 1.0).to(pushed.dtype)
    if inplace:
        return pushed.mul_(held).sub_(positive).mul_(alpha).add_(positive)
    return pushed * held * alpha + positive * (1 - alpha)


def _size(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=wide)


class GuidedText(NamedTuple):
    """Text source: what `positive` gives, pushed away from the negative text [1, T, C]."""

    positive: TextSource
    negative: Tensor
    strength: Strength
    inplace: bool

    @property
    def tokenwise(self) -> bool:
        """As the positive one."""
        return self.positive.tokenwise

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """Both attentions, and their combination over all heads together."""
        k, v = (t.expand(q.shape[0], -1, -1, -1) for t in cross.keys_values(self.negative))
        positive, negative = self.positive.attend(cross, q).flatten(2), cross.attention(q, k, v).flatten(2)
        return guided(positive, negative, self.strength, inplace=self.inplace).unflatten(2, q.shape[2:])

    def on(self, shard: Shard) -> GuidedText:
        """The positive text's part; the negative text is the same for all tokens."""
        return self._replace(positive=self.positive.on(shard))


@dataclass(frozen=True)
class NormalizedAttentionGuidance(Extension):
    """Present in every model with text layers, idle without its payload."""

    payload: ClassVar[type] = NegativeText

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Reads the model's own text layers."""
        return cls() if "text_embedding.0.weight" in shapes else None

    def prepare(
        self, model: WanModel, payload: NegativeText, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Wraps the text source, so that it acts in every block that reads text."""
        negative = model.embed_text(payload.prompts, tokens.x.dtype).flatten(0, 1)[None]
        strength = Strength(payload.scale, payload.tau, payload.alpha)
        return tokens._replace(text=GuidedText(tokens.text, negative, strength, payload.inplace)), None


EXTENSION = NormalizedAttentionGuidance
