"""Skip layer guidance: passes without the prompt go around some blocks, so that guidance leads from a weaker model.

Source: Stability AI's SD 3.5 inference code (skip layer guidance). It has no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens


@dataclass(frozen=True)
class SkippedBlocks(Payload):
    """Socket SLGARGS: blocks, counted from 0, and the part of the steps (0..1) in which they are skipped.

    unprompted: this pass goes without the prompt; others run every block.
    """

    blocks: tuple[int, ...]
    start_percent: float = 0.0
    end_percent: float = 1.0
    unprompted: bool = False
    needs: ClassVar[str] = "Skip layer guidance works with every Wan model; this one was built without extensions."

    def without(self, names: frozenset[str]) -> Self:
        """The form that skips, for passes without the prompt."""
        return replace(self, unprompted="text" in names)


@dataclass(frozen=True)
class SkipLayerGuidance(Extension):
    """Present in every model, idle without its payload."""

    payload: ClassVar[type] = SkippedBlocks

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Needs no weights."""
        return cls()

    def prepare(
        self, model: WanModel, payload: SkippedBlocks, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, tuple[int, ...] | None]:
        """Idle in passes with the prompt and outside its steps. Raises ValueError for blocks that the model lacks."""
        count = len(model.blocks)
        missing = [block for block in payload.blocks if block >= count]
        if missing:
            raise ValueError(
                f"WanVideoSLG skips block {missing[0]}, but this model has blocks 0 to {count - 1}: change 'blocks'."
            )
        acts = payload.unprompted and inputs.step.within(payload.start_percent, payload.end_percent)
        return tokens, payload.blocks if acts else None

    def skips(self, state: tuple[int, ...], index: int) -> bool:
        """Whether the block is in the list."""
        return index in state


EXTENSION = SkipLayerGuidance
