"""MagCache (Ma et al. 2025; Zehong-Ma/MagCache): sizes of the steps' changes follow a curve, whatever the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..wanvideo.conditioning import Step
from ..wanvideo.step_cache import Moment, StepCache, StepMemory
from .published import MODELS, variant_of

if TYPE_CHECKING:
    from ..wanvideo.loading import WanVideoModel


@dataclass(frozen=True, kw_only=True)
class MagCache(StepCache):
    """threshold: of the error of a change's size, added up over the steps left out; longest: most of them in a row."""

    label: ClassVar[str] = "MagCache"
    threshold: float = 0.02
    longest: int = 4

    def described(self, model: WanVideoModel) -> str:
        """With the model whose curve it follows."""
        return f"{self.label}, by the curve of {variant_of(model, self.label)}"

    def maker(self, model: WanVideoModel) -> Callable[[torch.device], MagCacheMemory]:
        """Raises ValueError where no curve is published for the model."""
        return partial(MagCacheMemory, self, MODELS[variant_of(model, self.label)].magcache)


class MagCacheMemory(StepMemory):
    """How wrong the last change that was computed has become. curve: size of each step's change to the one before."""

    cache: MagCache

    def __init__(self, cache: MagCache, curve: Sequence[float], device: torch.device) -> None:
        super().__init__(cache, device)
        self._curve = curve
        self._restart()

    def _restart(self) -> None:
        self._ratio, self._error, self._row = 1.0, 0.0, 0

    def blocks(self, moment: Moment, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """Leaves the blocks out while the error stays small."""
        if self.goes_on(step) and self.cache.covers(step.in_run):
            self._ratio *= ratio_at(self._curve, step)
            self._error += abs(1 - self._ratio)
            self._row += 1
            if self.may_skip(self._error < self.cache.threshold and self._row <= self.cache.longest):
                return self.skip(moment.tokens, step)
        self._restart()
        return self.run_and_keep(moment.tokens, step, run)


def ratio_at(curve: Sequence[float], step: Step) -> float:
    """The curve's value nearest to the step's place in the schedule."""
    return curve[round(step.percent * (len(curve) - 1))]
