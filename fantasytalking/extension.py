"""FantasyTalking (Wang et al. 2025): video tokens attend to the speech behind their own latent frame.

Source: Fantasy-AMAP/fantasy-talking.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from ..wanvideo.conditioning import Payload, Row, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import at_step, per_step
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import Heads, ModelInputs, Tokens
from .frame_attention import FrameContext, attend_by_frame, frame_context

PROJECTION = "proj_model."
KEYS = "blocks.0.cross_attn.k_proj.weight"
OWN_KEYS = re.compile(r"proj_model\.proj\.|blocks\.\d+\.cross_attn\.[kv]_proj\.")
# The name of the speech in guidance.
AUDIO = "audio"


@dataclass(frozen=True, kw_only=True)
class FantasyTalkingEmbeds(Payload):
    """Projected speech (socket FANTASYTALKING_EMBEDS).

    context [B, F, T, A]: speech tokens behind each latent frame, or [B, T, A] for all frames alike; lengths [B, F] or
    [B]: how many of them are speech, the rest is filling. scale: strength, cfg_scale: audio guidance, each one number
    or one a step. leading: latent frames before the video's, which hear nothing.
    """

    context: Tensor
    lengths: Tensor
    scale: float | Sequence[float] = 1.0
    cfg_scale: float | Sequence[float] = 1.0
    leading: int = 0
    needs: ClassVar[str] = (
        f"The speech of FantasyTalking needs a model with {KEYS}: connect FantasyTalkingModelLoader to the "
        "'fantasytalking_model' input of WanVideoModelLoader."
    )

    def without(self, names: frozenset[str]) -> Self | None:
        """Without audio there is no audio attention at all."""
        return None if AUDIO in names else self

    def window(self, window: Window) -> Self:
        """The speech of these latent frames; references have none. Raises ValueError where it ends before the video."""
        if self.context.dim() == 3:
            return self
        places = window.video_in(self.context.shape[1])
        total = max(places) + 1 if window.video_total is None else window.video_total
        if total > self.context.shape[1]:
            raise ValueError(
                f"FantasyTalkingWav2VecEmbeds made speech for {self.context.shape[1]} latent frames, but the video has "
                f"{total}: give it the num_frames of the video."
            )
        context, lengths = self.context[:, places], self.lengths[:, places]
        return replace(self, context=context, lengths=lengths, leading=window.leading)

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Nothing + scale * (no audio - nothing) + cfg_scale * (all - no audio): each term has a scale of its own."""
        audio = at_step(per_step(self.cfg_scale), step)
        if math.isclose(audio, 1.0):
            return None
        return Row(audio), Row(scale - audio, frozenset({AUDIO})), Row(1.0 - scale, frozenset({"text", AUDIO}))


@dataclass(frozen=True)
class FantasyTalking(Extension):
    """context_dim: width of the projected speech."""

    context_dim: int
    payload: ClassVar[type] = FantasyTalkingEmbeds
    file: ClassVar[Kind] = Kind(
        "FantasyTalking module",
        "FantasyTalking Model Loader",
        (r"^proj_model\.proj\.weight$", r"^blocks\.\d+\.cross_attn\.k_proj\.weight$"),
        own=(PROJECTION,),
    )

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the first block has keys for speech."""
        return cls(context_dim=shapes[KEYS][1]) if KEYS in shapes else None

    def owns(self, key: str) -> bool:
        """Keys and values for speech in every block; files that are merged with a transformer have the projection."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds k_proj and v_proj to every text cross-attention."""
        for block in model.blocks:
            block.cross_attn.k_proj = nn.Linear(self.context_dim, model.config.dim, bias=False)
            block.cross_attn.v_proj = nn.Linear(self.context_dim, model.config.dim, bias=False)

    def prepare(
        self, model: WanModel, payload: FantasyTalkingEmbeds, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, FrameContext | None]:
        """The speech of every frame; idle in steps of strength 0. Raises ValueError for speech of another width."""
        scale = at_step(per_step(payload.scale), inputs.step)
        if scale == 0:
            return tokens, None
        width = payload.context.shape[-1]
        if width != self.context_dim:
            raise ValueError(
                f"The blocks read speech of {self.context_dim} channels but FantasyTalkingWav2VecEmbeds gives {width}: "
                "connect one FantasyTalkingModelLoader to both that node and WanVideoModelLoader."
            )
        return tokens, frame_context(
            tokens, payload.context, scale=scale, leading=payload.leading, lengths=payload.lengths
        )

    def on(self, state: FrameContext, shard: Shard) -> FrameContext:
        """Every frame's speech for this part of its places."""
        return state._replace(first=shard.count(state.first), last=shard.count(state.last))

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: FrameContext) -> tuple[Heads, FrameContext]:
        """Adds attention to the speech of each frame, of which the filling does not count."""
        return attend_by_frame(block, heads, cond, block.cross_attn.k_proj, block.cross_attn.v_proj), cond


EXTENSION = FantasyTalking
