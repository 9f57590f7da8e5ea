"""FantasyPortrait (Wang et al. 2025): video tokens attend to the motion of a face behind their own latent frame.

Source: Fantasy-AMAP/fantasy-portrait.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from ..fantasytalking.frame_attention import FrameContext, attend_by_frame, frame_context
from ..wanvideo.conditioning import Payload, Row, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import at_step, per_step
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import Heads, ModelInputs, Tokens

K_PROJ, V_PROJ = "ip_adapter_single_stream_k_proj", "ip_adapter_single_stream_v_proj"
KEYS = f"blocks.0.cross_attn.{K_PROJ}.weight"
OWN_KEYS = re.compile(rf"(mouth|emo)_proj_model\.|blocks\.\d+\.cross_attn\.({K_PROJ}|{V_PROJ})\.")
PROJECTIONS = ("proj_model.", "mouth_proj_model.", "emo_proj_model.")
MOTION = "pd_fpg."
# The name of the face's motion in guidance.
PORTRAIT = "portrait"


@dataclass(frozen=True, kw_only=True)
class PortraitMotion(Payload):
    """The motion of a face, and how a run follows it (in a socket WANVIDIMAGE_EMBEDS).

    context [B, F, T, A]: motion tokens behind each latent frame, or [B, T, A] for all frames alike. strength, and the
    part of the steps (0..1) in which it acts. cfg_scale: guidance by motion, one number or one a step. leading: latent
    frames before the video's, which do not move.
    """

    context: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    cfg_scale: float | Sequence[float] = 1.0
    leading: int = 0
    needs: ClassVar[str] = (
        f"The motion of FantasyPortrait needs a model with {KEYS}: connect FantasyPortraitModelLoader to the "
        "'fantasyportrait_model' input of WanVideoModelLoader."
    )

    def acts(self, step: Step) -> bool:
        """Whether it changes anything in this step."""
        return self.strength != 0 and step.within(self.start, self.end)

    def without(self, names: frozenset[str]) -> Self | None:
        """Without the portrait there is no attention to motion at all."""
        return None if PORTRAIT in names else self

    def window(self, window: Window) -> Self:
        """The motion of these latent frames; references have none. Raises ValueError where it ends before the video.

        In a loop, whose length is the sound's, the last pose is held.
        """
        if self.context.dim() == 3:
            return self
        count, places, total = self.context.shape[1], list(window.video), window.video_total
        if total is None:
            places = [min(place, count - 1) for place in places]
        elif total > count:
            raise ValueError(
                f"FantasyPortraitFaceDetector found motion for {count} latent frames, but the video has {total}: give "
                "it pictures of the whole video, or make the video as short."
            )
        return replace(self, context=self.context[:, places], leading=window.leading)

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Nothing + scale * (still - nothing) + cfg_scale * (all - still), where the still pass has the prompt alone.

        In steps in which the motion does not act, the prompt alone guides.
        """
        motion = at_step(per_step(self.cfg_scale), step)
        if math.isclose(motion, 1.0) or not self.acts(step):
            return None
        return Row(motion), Row(scale - motion, frozenset({PORTRAIT})), Row(1.0 - scale, frozenset({"text", PORTRAIT}))


@dataclass(frozen=True)
class FantasyPortrait(Extension):
    """context_dim: width of the motion tokens."""

    context_dim: int
    payload: ClassVar[type] = PortraitMotion
    file: ClassVar[Kind] = Kind(
        "FantasyPortrait module",
        "FantasyPortrait Model Loader",
        (r"^mouth_proj_model\.", r"^emo_proj_model\.", rf"\.cross_attn\.{K_PROJ}\.weight$"),
        own=(*PROJECTIONS, MOTION),
    )
    high_precision: ClassVar[tuple[str, ...]] = (K_PROJ, V_PROJ)
    aliases: ClassVar[Mapping[str, str]] = {"ip_adapter.blocks.": "blocks."}

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the first block has keys for motion."""
        return cls(context_dim=shapes[KEYS][1]) if KEYS in shapes else None

    def owns(self, key: str) -> bool:
        """Keys and values for motion in every block; files that are merged with a transformer have the projections."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds the two layers to every text cross-attention."""
        for block in model.blocks:
            for name in (K_PROJ, V_PROJ):
                block.cross_attn.add_module(name, nn.Linear(self.context_dim, model.config.dim, bias=False))

    def prepare(
        self, model: WanModel, payload: PortraitMotion, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, FrameContext | None]:
        """The motion of every frame; idle outside its steps. Raises ValueError for motion of another width."""
        if not payload.acts(inputs.step):
            return tokens, None
        width = payload.context.shape[-1]
        if width != self.context_dim:
            raise ValueError(
                f"The blocks read motion of {self.context_dim} channels but FantasyPortraitFaceDetector gives {width}: "
                "connect one FantasyPortraitModelLoader to both that node and WanVideoModelLoader."
            )
        # The filling of contexts counts: the authors attend to its zeros, too.
        return tokens, frame_context(tokens, payload.context, scale=payload.strength, leading=payload.leading)

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: FrameContext) -> tuple[Heads, FrameContext]:
        """Adds attention to the motion of each frame."""
        cross = block.cross_attn
        return attend_by_frame(block, heads, cond, getattr(cross, K_PROJ), getattr(cross, V_PROJ)), cond


EXTENSION = FantasyPortrait
