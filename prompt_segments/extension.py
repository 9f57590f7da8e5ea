"""Several prompts for one video: its frames are shared out among them in text cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import CrossAttention, ModelInputs, TextSource, Tokens


@dataclass(frozen=True)
class PromptSegments(Payload):
    """The prompts after the first, [tokens, text_dim] each, in the order of the frames."""

    prompts: tuple[Tensor, ...]
    needs: ClassVar[str] = "Several prompts work with every Wan model; this one was built without extensions."

    def window(self, window: Window) -> Self | None:
        """Windows pick one prompt each, so that only a whole video has segments."""
        return self if window.whole else None

    def without(self, names: frozenset[str]) -> Self | None:
        """There is one negative prompt for all frames."""
        return None if "text" in names else self


def segments(prompts: Sequence[Tensor]) -> tuple[PromptSegments, ...]:
    """The payloads of text embeds with these prompts: none for a single one."""
    return (PromptSegments(tuple(prompts[1:])),) if len(prompts) > 1 else ()


def frame_ranges(frames: int, prompts: int) -> tuple[tuple[int, int], ...]:
    """Frames [start, stop) of each prompt: equal shares, the rest to the last; without enough frames one each."""
    share = max(1, frames // prompts)
    starts = [min(index * share, frames) for index in range(prompts)]
    return tuple(zip(starts, [*starts[1:], frames], strict=True))


class SegmentedText(NamedTuple):
    """Text source: `first` rules all queries but those in `ranges`, which attend to `others` [1, T, C] instead."""

    first: TextSource
    others: tuple[Tensor, ...]
    ranges: tuple[tuple[int, int], ...]
    tokenwise = False

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """Each segment of the queries q [B, L, H, D] to its own prompt."""
        begin, end = self.ranges[0][0], self.ranges[-1][1]
        parts = [self.first.attend(cross, q[:, :begin])]
        for text, (start, stop) in zip(self.others, self.ranges, strict=True):
            k, v = (t.expand(q.shape[0], -1, -1, -1) for t in cross.keys_values(text))
            parts.append(cross.attention(q[:, start:stop], k, v))
        if end < q.shape[1]:
            parts.append(self.first.attend(cross, q[:, end:]))
        return torch.cat(parts, dim=1)

    def on(self, shard: Shard) -> SegmentedText:
        """The segments' tokens of this part."""
        ranges = tuple((shard.count(start), shard.count(stop)) for start, stop in self.ranges)
        return self._replace(first=self.first.on(shard), ranges=ranges)


@dataclass(frozen=True)
class PromptSegmentsExtension(Extension):
    """Present in every model, idle without its payload."""

    payload: ClassVar[type] = PromptSegments

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Reads the model's own text layers."""
        return cls() if "text_embedding.0.weight" in shapes else None

    def prepare(
        self, model: WanModel, payload: PromptSegments, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Puts the segments in the place of the one prompt, where there are frames for more than one."""
        frames, height, width = tokens.grid
        _, *ranges = frame_ranges(frames, len(payload.prompts) + 1)
        used = [(prompt, ends) for prompt, ends in zip(payload.prompts, ranges, strict=True) if ends[0] < ends[1]]
        if not used:
            return tokens, None
        texts = model.embed_text([prompt for prompt, _ in used], tokens.x.dtype).split(1)
        places = height * width
        spans = tuple((start * places, stop * places) for _, (start, stop) in used)
        return tokens._replace(text=SegmentedText(tokens.text, texts, spans)), None


EXTENSION = PromptSegmentsExtension
