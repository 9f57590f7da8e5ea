"""EasyCache (Zhou et al. 2025; H-EmbodVis/EasyCache): the output's change with the input is measured as it runs.

It needs no published numbers, so that it serves every model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..wanvideo.conditioning import Step
from ..wanvideo.step_cache import StepCache, StepMemory

if TYPE_CHECKING:
    from ..wanvideo.loading import WanVideoModel


@dataclass(frozen=True, kw_only=True)
class EasyCache(StepCache):
    """threshold: of the predicted relative change of the velocity, added up over the steps left out."""

    label: ClassVar[str] = "EasyCache"
    threshold: float = 0.015
    start_step: int = 10

    def maker(self, model: WanVideoModel) -> Callable[[torch.device], EasyCacheMemory]:
        """For any model."""
        return partial(EasyCacheMemory, self)


class EasyCacheMemory(StepMemory):
    """Latents of the last step; latents and velocity of the last step that ran; their rate of change."""

    cache: EasyCache

    def __init__(self, cache: EasyCache, device: torch.device) -> None:
        super().__init__(cache, device)
        self._before: Tensor | None = None
        self._ran: tuple[Tensor, Tensor] | None = None
        self._rate: Tensor | None = None
        self._error: Tensor | float = 0.0

    def whole(self, latents: Tensor, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """Leaves the whole model out while the predicted change stays small."""
        if not self.goes_on(step):
            self._before = self._ran = self._rate = None
        before, self._before = self._before, latents.to(self.keeping, copy=True)
        if self._rate is not None and self.cache.covers(step.in_run):
            change = _size(latents - before.to(latents.device))
            self._error = self._error + self._rate * change / _size(self._ran[1].to(latents.device))
            if self.may_skip(bool(self._error < self.cache.threshold)):
                return self.skip(latents, step)
        self._error = 0.0
        velocity = self.run_and_keep(latents, step, run)
        if self._ran is not None:
            old_latents, old_velocity = (t.to(latents.device) for t in self._ran)
            self._rate = _size(velocity - old_velocity) / _size(latents - old_latents)
        self._ran = (self._before, velocity.to(self.keeping, copy=True))
        return velocity


def _size(t: Tensor) -> Tensor:
    return t.abs().mean()
