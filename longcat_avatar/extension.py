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
from ..multitalk.extension import OTHER_ATTENTION, PROJECTION, AudioWindow, audio_tokens
from ..multitalk.multitalk import AUDIO_WINDOW, AudioProjModel, SingleStreamMultiAttention
from ..multitalk.speakers import speaker_map, token_masks
from ..wanvideo.extension import Extension
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import HeadRMSNorm, WanLayerNorm, gated_residual, modulate, per_token
from ..wanvideo.modules.model import WanModel
from ..wanvideo.modules.stretches import stretches
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import Grid, Heads, HeadsRead, ModelInputs, Tokens, video_tokens

OWN_KEYS = re.compile(rf"{re.escape(PROJECTION)}|blocks\.\d+\.(audio_cross_attn|audio_modulation\.1|norm_x)\.")


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


class Speech(NamedTuple):
    """Audio tokens [B, F, P * T, C] and strength; how many frames are given, which hear nothing; the token grid.

    embedding [B, R, E], rows [L] or None: the time of each token. The others are as MultiTalk's.
    """

    tokens: Tensor
    scale: Tensor
    given: int
    grid: Grid
    embedding: Tensor
    rows: Tensor | None
    masks: Tensor | None
    speakers: int
    scores: Tensor | None = None
    parts: int = 1
    shard: Shard = WHOLE


@dataclass(frozen=True)
class LongCatAvatar(Extension):
    """Sizes of the audio layers, as MultiTalk's; width: channels of the time embedding."""

    features: int
    intermediate_dim: int
    context_tokens: int
    output_dim: int
    width: int
    payload: ClassVar[type] = AudioWindow
    high_precision: ClassVar[tuple[str, ...]] = (PROJECTION.rstrip("."), "audio_modulation")

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By the norms of its audio attention."""
        if OTHER_ATTENTION not in shapes:
            return None
        first, last = shapes[f"{PROJECTION}proj1.weight"], shapes[f"{PROJECTION}proj3.weight"]
        output_dim = shapes[f"{PROJECTION}norm.weight"][0]
        return cls(
            features=first[1] // AUDIO_WINDOW,
            intermediate_dim=first[0],
            context_tokens=last[0] // output_dim,
            output_dim=output_dim,
            width=shapes["blocks.0.audio_modulation.1.weight"][1],
        )

    def owns(self, key: str) -> bool:
        """The projection, and in every block audio attention, its norm and its modulation."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds the projection, and the audio layers to every block."""
        config = model.config
        model.multitalk_audio_proj = AudioProjModel(
            self.features, self.intermediate_dim, self.context_tokens, self.output_dim
        )
        for block in model.blocks:
            block.norm_x = WanLayerNorm(config.dim, config.eps, elementwise_affine=True)
            block.audio_cross_attn = LongCatAudioAttention(config.dim, self.output_dim, config.num_heads, config.eps)
            block.audio_modulation = Modulation(self.width, config.dim, parts=3)

    def prepare(
        self, model: WanModel, payload: AudioWindow, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Speech]:
        """Audio tokens of every latent frame. Raises ValueError where speech and video are not of one length."""
        given = next((other for other in inputs.payloads if isinstance(other, GivenFrames)), GivenFrames(frames=0))
        speakers = int(payload.audio.shape[1])
        audio = audio_tokens(model.multitalk_audio_proj, payload.audio, self.features).to(tokens.x.dtype)
        if given.position is not None:
            audio = torch.cat((audio[:, :1], audio), dim=1)
        frames = tokens.grid[0]
        if audio.shape[1] != frames:
            raise ValueError(
                f"The speech covers {audio.shape[1]} latent frames but the video has {frames}: give the sampler the "
                "embeds of WanVideo LongCat Avatar Extend Embeds."
            )
        masks, parts = None, model.parts(tokens.x.shape)
        if speakers > 1:
            # Who speaks where is measured over all tokens.
            masks, parts = token_masks(payload.masks, speakers, tokens.grid, tokens.x.device), 1
        return tokens, Speech(
            audio.expand(tokens.x.shape[0], -1, -1, -1),
            payload.scale,
            given.frames,
            tokens.grid,
            tokens.embedding,
            tokens.rows,
            masks,
            speakers,
            parts=parts,
        )

    def on(self, state: Speech, shard: Shard) -> Speech:
        """As MultiTalk's."""
        rows = None if state.rows is None else shard.take(state.rows, dim=0)
        return state._replace(grid=shard.grid(state.grid), rows=rows, shard=shard)

    def reads_heads(self, cond: Speech) -> HeadsRead | None:
        """As MultiTalk's."""
        if cond.masks is None:
            return None
        return HeadsRead(video_tokens(cond.grid), cond.grid[1] * cond.grid[2], result=False)

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: Speech) -> tuple[Heads, Speech]:
        """Measures which speaker each token of a frame that is made belongs to."""
        count, places = video_tokens(cond.grid), cond.grid[1] * cond.grid[2]
        keys = cond.shard.frames(heads.k[:, :places])
        return heads, cond._replace(scores=speaker_map(heads.q[:, cond.given * places : count], keys, cond.masks))

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Speech) -> tuple[Tensor, Speech]:
        """Adds what the frames that are made hear, some of them at a time."""
        places, made = cond.grid[1] * cond.grid[2], cond.grid[0] - cond.given
        out = x.clone()
        for part in stretches(made, min(cond.parts, made)):
            frames = slice(cond.given + part.start, cond.given + part.stop)
            tokens = slice(frames.start * places, frames.stop * places)
            rows = None if cond.rows is None else cond.rows[tokens]
            out[:, tokens] = self._heard(block, x[:, tokens], cond._replace(tokens=cond.tokens[:, frames], rows=rows))
        return out, cond

    @staticmethod
    def _heard(block: WanAttentionBlock, x: Tensor, cond: Speech) -> Tensor:
        """x [B, L, C] of some frames with what they hear."""
        audio, shape = cond.tokens.flatten(0, 1), (cond.tokens.shape[1], *cond.grid[1:])
        scores = cond.scores, cond.speakers, cond.shard
        heard = block.audio_cross_attn(block.norm_x(x).contiguous(), audio, shape, *scores)
        shift, scale, gate = (per_token(part, cond.rows) for part in block.audio_modulation(cond.embedding))
        return gated_residual(x, modulate(block.norm1, heard, shift, scale), gate * cond.scale)


EXTENSION = LongCatAvatar
