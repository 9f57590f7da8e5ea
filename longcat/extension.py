"""LongCat-Video (13.6B): a transformer like Wan's with other layers, which goes on from frames that are given.

Given frames are at time 0, see each other alone and read no prompt; all others see everything.

Source: meituan-longcat/LongCat-Video (longcat_video/modules/longcat_video_dit.py, avatar/attention.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..attention import AttentionCall
from ..attention_backends.contract import Span
from ..wanvideo.extension import Extension
from ..wanvideo.families import Layout
from ..wanvideo.modifier import Modifier
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import ModelInputs, Tokens
from .given import GivenFrames, GoesOn
from .layers import LongCatBlock, LongCatHead, SixOfOne, TextEmbedding, TimeEmbedding

OWN_KEYS = re.compile(r"time_embedding\.mlp\.|(blocks\.\d+|head)\.modulation\.1\.|blocks\.\d+\.ffn\.w[123]\.")


class Given(NamedTuple):
    """places: of a frame of the whole video. count: how many tokens here, at the start, are given; tokens: those."""

    payload: GivenFrames
    places: int
    count: int
    tokens: Tensor | None = None


@dataclass(frozen=True)
class LongCat(Extension):
    """width: channels of the time embedding."""

    width: int
    payload: ClassVar[type] = GivenFrames
    high_precision: ClassVar[tuple[str, ...]] = ("modulation",)
    layout: ClassVar[Layout] = Layout(time="time_embedding.mlp.0", feed_forward="blocks.0.ffn.w1")

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By the SwiGLU of its blocks."""
        if "blocks.0.ffn.w1.weight" not in shapes or "time_embedding.mlp.0.weight" not in shapes:
            return None
        return cls(shapes["time_embedding.mlp.0.weight"][0])

    def owns(self, key: str) -> bool:
        """The layers that Wan has not."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Replaces blocks, head and embeddings by LongCat's."""
        config, attention = model.config, model.blocks[0].self_attn.attention
        model.text_embedding = TextEmbedding(config.text_dim, config.dim)
        model.time_embedding = TimeEmbedding(config.freq_dim, self.width)
        model.time_projection = SixOfOne()
        model.blocks = nn.ModuleList(LongCatBlock(config, attention, self.width) for _ in model.blocks)
        model.head = LongCatHead(config, model.head.head.out_features, self.width)

    def modifiers(self) -> tuple[Modifier, ...]:
        """What makes given frames of extra latents."""
        return (GoesOn(),)

    def prepare(
        self, model: WanModel, payload: GivenFrames, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Given]:
        """The positions of a reference, and who sees whom. Raises ValueError where no frame is left to make."""
        frames, height, width = tokens.grid
        places = height * width
        if payload.frames >= frames:
            raise ValueError(
                f"All {frames} latent frames of the video are given, so that none is left to make: choose more frames."
            )
        if payload.position is not None:
            device = tokens.x.device
            parts = (
                model.rope((1, height, width), start=(payload.position, 0, 0), device=device),
                model.rope((frames - 1, height, width), device=device),
                tokens.rope[frames * places :],
            )
            tokens = tokens._replace(rope=torch.cat(parts))
        return tokens, Given(payload, places, payload.frames * places)

    def on(self, state: Given, shard: Shard) -> Given:
        """Attention goes on seeing the whole sequence."""
        return state._replace(count=shard.count(state.count))

    def attend(self, block: WanAttentionBlock, call: AttentionCall, cond: Given) -> tuple[AttentionCall, Given]:
        """Given frames do not see the others."""
        return call._replace(spans=spans(cond.payload, call.q.shape[1], cond.places)), cond

    def before_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Given) -> tuple[Tensor, Given]:
        """Given frames as they are."""
        return x, cond._replace(tokens=x[:, : cond.count])

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Given) -> tuple[Tensor, Given]:
        """Given frames as they were: they read no prompt."""
        return torch.cat((cond.tokens, x[:, cond.count :]), dim=1), cond


def spans(payload: GivenFrames, tokens: int, places: int) -> tuple[Span, ...]:
    """(queries, keys) of a sequence of so many tokens, of frames of so many places."""
    apart, given, everything = payload.apart * places, payload.frames * places, (0, tokens)
    first, last = (edge * places for edge in payload.unseeing) if payload.unseeing else (given, given)
    pairs = (
        ((0, apart), (0, apart)),
        ((apart, given), (apart, given)),
        ((given, first), everything),
        ((first, last), (apart, tokens)),
        ((last, tokens), everything),
    )
    return tuple((queries, keys) for queries, keys in pairs if queries[0] < queries[1])


EXTENSION = LongCat
