"""LongCat-Video-Avatar: speech in every block of LongCat, for the frames that are made.

What a frame hears passes the norm of the block and a modulation of its own. Several speakers are told apart as in
MultiTalk, by how much a token attends to each of them in the first frame.

Source: meituan-longcat/LongCat-Video (longcat_video/modules/avatar).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..longcat.given import GivenFrames
from ..longcat.layers import Modulation
from ..multitalk.extension import OTHER_ATTENTION, PROJECTION, AudioWindow, MultiTalk, Speech, audio_sizes
from ..multitalk.multitalk import SingleStreamMultiAttention
from ..wanvideo.config import WanConfig
from ..wanvideo.families import Kind
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import HeadRMSNorm, gated_residual, modulate, per_token
from ..wanvideo.modules.model import WanModel
from ..wanvideo.modules.stretches import stretches
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import Heads, HeadsRead, ModelInputs, Tokens

MODULATION = "audio_modulation"
OWN_KEYS = re.compile(rf"blocks\.\d+\.{MODULATION}\.1\.")


class LongCatAudioAttention(SingleStreamMultiAttention):
    """MultiTalk's, with norms of each head of queries and keys."""

    def __init__(self, dim: int, encoder_hidden_states_dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, encoder_hidden_states_dim, num_heads)
        self.q_norm, self.k_norm = (HeadRMSNorm(dim // num_heads, eps) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """As the parent's."""
        return self.q_norm(self.q_linear(x)).unflatten(-1, self.heads)

    def keys_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """As the parent's."""
        k, v = super().keys_values(encoder_hidden_states)
        return self.k_norm(k.flatten(2)).unflatten(-1, self.heads), v


class Heard(NamedTuple):
    """Speech; how many frames are given, which hear nothing; embedding [B, R, E], rows [L] or None: a token's time."""

    speech: Speech
    given: int
    embedding: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class LongCatAvatar(MultiTalk):
    """width: channels of the time embedding."""

    width: int
    file: ClassVar[Kind | None] = None
    takes_sums: ClassVar[tuple[str, ...]] = ()
    high_precision: ClassVar[tuple[str, ...]] = (PROJECTION.rstrip("."), MODULATION)

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By the norms of its audio attention."""
        sizes = audio_sizes(shapes)
        if sizes is None or OTHER_ATTENTION not in shapes:
            return None
        return cls(**sizes, width=shapes[f"blocks.0.{MODULATION}.1.weight"][1])

    def owns(self, key: str) -> bool:
        """Its modulation, too."""
        return super().owns(key) or OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds audio_modulation, too."""
        super().build(model)
        for index in self.voiced:
            model.blocks[index].audio_modulation = Modulation(self.width, model.config.dim, parts=3)

    def attention(self, config: WanConfig) -> LongCatAudioAttention:
        """With norms of each head."""
        return LongCatAudioAttention(config.dim, self.output_dim, config.num_heads, config.eps)

    def prepare(
        self, model: WanModel, payload: AudioWindow, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Heard]:
        """Audio tokens of every latent frame. Raises ValueError where speech and video are not of one length."""
        given = next((other for other in inputs.payloads if isinstance(other, GivenFrames)), GivenFrames(frames=0))
        tokens, speech = super().prepare(model, payload, inputs, tokens)
        if given.position is not None:
            speech = speech._replace(tokens=torch.cat((speech.tokens[:, :1], speech.tokens), dim=1))
        frames = tokens.grid[0]
        if speech.tokens.shape[1] != frames:
            raise ValueError(
                f"The speech covers {speech.tokens.shape[1]} latent frames but the video has {frames}: give the "
                "sampler the embeds of WanVideo LongCat Avatar Extend Embeds."
            )
        return tokens, Heard(speech, given.frames, tokens.embedding, tokens.rows)

    def on(self, state: Heard, shard: Shard) -> Heard:
        """Times for this part of the tokens."""
        rows = None if state.rows is None else shard.take(state.rows, dim=0)
        return state._replace(speech=super().on(state.speech, shard), rows=rows)

    def reads_heads(self, cond: Heard) -> HeadsRead | None:
        """As MultiTalk's."""
        return super().reads_heads(cond.speech)

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: Heard) -> tuple[Heads, Heard]:
        """As MultiTalk's."""
        heads, speech = super().self_attn(block, heads, cond.speech)
        return heads, cond._replace(speech=speech)

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Heard) -> tuple[Tensor, Heard]:
        """Adds what the frames that are made hear, some of them at a time."""
        speech, (frames, height, width) = cond.speech, cond.speech.grid
        places, made, out = height * width, frames - cond.given, x.clone()
        for part in stretches(made, min(speech.parts, made)):
            some = slice(cond.given + part.start, cond.given + part.stop)
            tokens = slice(some.start * places, some.stop * places)
            audio = block.audio_cross_attn(
                block.norm_x(x[:, tokens]).contiguous(),
                speech.tokens[:, some].flatten(0, 1),
                (some.stop - some.start, height, width),
                None if speech.scores is None else speech.scores[:, tokens],
                speech.speakers,
                speech.shard,
            )
            rows = None if cond.rows is None else cond.rows[tokens]
            shift, scale, gate = (per_token(row, rows) for row in block.audio_modulation(cond.embedding))
            heard = modulate(block.norm1, audio, shift, scale)
            out[:, tokens] = gated_residual(x[:, tokens], heard, gate * speech.scale)
        return out, cond


EXTENSION = LongCatAvatar
