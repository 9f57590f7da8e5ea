"""Self-attention in parts: in chosen steps, each prompt's share of the frames attends to itself only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from ..attention import AttentionCall
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modifier import Modifier, Run
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.request import Latent, SampleRequest
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")


@dataclass(frozen=True)
class SplitSteps(Payload):
    """steps: of the run, counted from 0; parts: how many the frames are split into."""

    steps: tuple[int, ...]
    parts: int
    needs: ClassVar[str] = "Split attention works with every Wan model; this one was built without extensions."

    def window(self, window: Window) -> Self | None:
        """A window has one prompt, so that there is nothing to split."""
        return self if window.whole else None


@dataclass(frozen=True)
class SplitByPrompts(Modifier):
    """Splits attention in these steps into as many parts as the run has prompts."""

    steps: tuple[int, ...]

    def around_run(self, run: Run) -> Run:
        """With the payload, where there are several prompts."""
        return partial(self._split, run)

    def _split(self, run: Run, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        parts = 0 if request.text is None else len(request.text.positive)
        if parts < 2:
            log.warning("video_attention_split_steps has no effect: frames are split by prompts; there is only one.")
            return run(request, host)
        return run(replace(request, payloads=(*request.payloads, SplitSteps(self.steps, parts))), host)


class FrameSpans(NamedTuple):
    """Tokens [start, stop) of each part."""

    ranges: tuple[tuple[int, int], ...]


def token_ranges(frames: int, places: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Equal shares of the frames, the first ones a frame longer where they do not divide; at least a frame each."""
    parts = min(parts, frames)
    ends = [places * (frames // parts * part + min(part, frames % parts)) for part in range(parts + 1)]
    return tuple(zip(ends, ends[1:], strict=False))


@dataclass(frozen=True)
class SplitAttention(Extension):
    """Present in every model, idle without its payload."""

    payload: ClassVar[type] = SplitSteps

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Needs no weights."""
        return cls()

    def prepare(
        self, model: WanModel, payload: SplitSteps, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, FrameSpans | None]:
        """Idle in other steps. Raises ValueError where references stand behind the video: no part would see them."""
        frames, height, width = tokens.grid
        if inputs.step.in_run not in payload.steps:
            return tokens, None
        if tokens.x.shape[1] > video_tokens(tokens.grid):
            raise ValueError(
                "video_attention_split_steps cannot run beside a system that adds reference tokens (Phantom, a Fun "
                "reference picture), which no part would see: disconnect one of the two."
            )
        return tokens, FrameSpans(token_ranges(frames, height * width, payload.parts))

    def attend(
        self, block: WanAttentionBlock, call: AttentionCall, cond: FrameSpans
    ) -> tuple[AttentionCall, FrameSpans]:
        """Each part to itself; tokens behind the video to what they attended to before."""
        video, total = cond.ranges[-1][1], call.q.shape[1]
        behind = tuple(span for span in call.spans if span[0][0] >= video)
        if not behind and total > video:
            behind = (((video, total), (0, total)),)
        return call._replace(spans=(*((part, part) for part in cond.ranges), *behind)), cond


EXTENSION = SplitAttention
