"""TeaCache (Liu et al. 2024; ali-vilab/TeaCache): the change of the time embedding predicts that of the output."""

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

MODES = ("e", "e0")


@dataclass(frozen=True, kw_only=True)
class TeaCache(StepCache):
    """threshold: of the predicted relative change of the output, added up over the steps left out.

    use_coefficients: predict by the polynomial published for the model; else the embedding's own change counts. mode:
    the time embedding (e), or its projection to the blocks' modulation (e0, also without coefficients).
    """

    label: ClassVar[str] = "TeaCache"
    threshold: float = 0.3
    use_coefficients: bool = True
    mode: str = "e"

    def described(self, model: WanVideoModel) -> str:
        """With the model whose polynomial it uses."""
        return (
            f"{self.label}, by the polynomial of {variant_of(model, self.label)}"
            if self.use_coefficients
            else self.label
        )

    def maker(self, model: WanVideoModel) -> Callable[[torch.device], TeaCacheMemory]:
        """Raises ValueError where no coefficients are published for the model."""
        if not self.use_coefficients:
            return partial(TeaCacheMemory, self, (1.0, 0.0))
        return partial(TeaCacheMemory, self, MODELS[variant_of(model, self.label)].teacache[self.mode])


class TeaCacheMemory(StepMemory):
    """The embedding of the last step. polynomial: coefficients, the highest power first."""

    cache: TeaCache

    def __init__(self, cache: TeaCache, polynomial: Sequence[float], device: torch.device) -> None:
        super().__init__(cache, device)
        self._polynomial = polynomial
        self._signal: Tensor | None = None
        self._distance = 0.0

    def blocks(self, moment: Moment, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """Leaves the blocks out while the predicted change stays small."""
        cache = self.cache
        signal = moment.embedding if cache.use_coefficients and cache.mode == "e" else moment.mod
        before, self._signal = self._signal, signal
        if self.goes_on(step) and cache.covers(step.in_run):
            change = float((signal - before).abs().mean() / before.abs().mean())
            self._distance += self._rescaled(change)
            if self.may_skip(self._distance < cache.threshold):
                return self.skip(moment.tokens, step)
        self._distance = 0.0
        return self.run_and_keep(moment.tokens, step, run)

    def _rescaled(self, change: float) -> float:
        value = 0.0
        for coefficient in self._polynomial:
            value = value * change + coefficient
        return value
