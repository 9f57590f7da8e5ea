"""Several prompts for one video: its frames are shared out among them in text cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..extension import Extension, Heads, KeysValues, Step, Tokens
from ..modules.model import WanAttentionBlock, WanModel


@dataclass(frozen=True)
class PromptSegments:
    """Payload: the prompts after the first, [tokens, text_dim] each, in the order of the frames; none is idle."""

    prompts: tuple[Tensor, ...] = ()
    needs: ClassVar[str] = "Several prompts work with every Wan model; this one was built without extensions."

    def window(self, frames: Sequence[int]) -> Self:
        """The same for every window."""
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move and cast the prompts."""
        return replace(self, prompts=tuple(prompt.to(device, dtype) for prompt in self.prompts))

    def stack(self, others: Sequence[Self]) -> Self:
        """The same prompts serve a whole batch."""
        mine = [id(prompt) for prompt in self.prompts]
        if any([id(prompt) for prompt in other.prompts] != mine for other in others):
            raise ValueError("All passes of a batch must have the same prompts; turn batched_cfg off.")
        return self


class Segments(NamedTuple):
    """Embedded prompts, [1, T, C] each, and the token range [start, stop) where each of them rules."""

    texts: tuple[Tensor, ...]
    ranges: tuple[tuple[int, int], ...]


def frame_ranges(frames: int, prompts: int) -> tuple[tuple[int, int], ...]:
    """Frames [start, stop) of each prompt: equal shares, the rest to the last; without enough frames one each."""
    share = max(1, frames // prompts)
    starts = [min(index * share, frames) for index in range(prompts)]
    return tuple(zip(starts, [*starts[1:], frames], strict=True))


class SegmentKeys(NamedTuple):
    """A block's keys and values of each prompt, [1, T, H, D], and the token ranges."""

    prompts: tuple[KeysValues, ...]
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PromptSegmentsExtension(Extension):
    """Present in every model, idle without its payload. Comes before systems that add to text cross-attention."""

    payload: ClassVar[type] = PromptSegments

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Reads the model's own text layers."""
        return cls() if "text_embedding.0.weight" in shapes else None

    def prepare(
        self, model: WanModel, payload: PromptSegments, step: Step, tokens: Tokens
    ) -> tuple[Tokens, Segments | None]:
        """Idle where every frame belongs to the first prompt."""
        frames, height, width = tokens.grid
        _, *ranges = frame_ranges(frames, len(payload.prompts) + 1)
        used = [(prompt, ends) for prompt, ends in zip(payload.prompts, ranges, strict=True) if ends[0] < ends[1]]
        if not used:
            return tokens, None
        texts = model.embed_text([prompt for prompt, _ in used], tokens.x.dtype).split(1)
        place = height * width
        return tokens, Segments(texts, tuple((start * place, stop * place) for _, (start, stop) in used))

    def once(self, block: WanAttentionBlock, state: Segments, index: int) -> tuple[KeysValues, ...]:
        """Keys and values depend on the prompts alone."""
        return tuple(block.cross_attn.keys_values(text) for text in state.texts)

    def block_cond(self, state: Segments, index: int, kept: tuple[KeysValues, ...]) -> SegmentKeys:
        """What `once` kept, with the ranges."""
        return SegmentKeys(kept, state.ranges)

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: SegmentKeys) -> tuple[Heads, SegmentKeys]:
        """Attention of each segment to its own prompt takes the place of that to the first."""
        cross, batch = block.cross_attn, heads.q.shape[0]
        parts = [heads.out[:, : cond.ranges[0][0]]]
        for prompt, (start, stop) in zip(cond.prompts, cond.ranges, strict=True):
            k, v = (t.expand(batch, -1, -1, -1) for t in prompt)
            parts.append(cross.attention(heads.q[:, start:stop], k, v))
        parts.append(heads.out[:, cond.ranges[-1][1] :])
        return heads._replace(out=torch.cat(parts, dim=1)), cond
