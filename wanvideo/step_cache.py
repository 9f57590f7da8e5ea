"""Step caches: where a step would change a prediction as an earlier one did, its blocks are left out.

A method is a `StepCache`, the settings that its node emits, and a `StepMemory`, what one prediction (with the prompt,
without it, without the speech; one window each) remembers of earlier steps. The methods are in `cache_methods/`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .conditioning import Step
from .config import WanConfig
from .shard import ALONE, Ranks

log = logging.getLogger("wanvideo")

CACHE_DEVICES = ("main_device", "offload_device")


class Moment(NamedTuple):
    """A forward before its blocks: time embedding [B, R, C], its projection [B, R, 6, C], tokens [B, L, C]."""

    embedding: Tensor
    mod: Tensor
    tokens: Tensor


class LoadedModel(Protocol):
    """What a method may know of the model: its file, its sizes, its systems."""

    path: Path
    config: WanConfig
    transformer: nn.Module


@dataclass(frozen=True, kw_only=True)
class StepCache(ABC):
    """Settings of a method: steps of the run, counted from 0, that may be left out; end_step -1 is the last.

    cache_device: where what is remembered lies: with the model, or in host memory.
    """

    label: ClassVar[str]
    start_step: int = 1
    end_step: int = -1
    cache_device: str = "offload_device"

    @abstractmethod
    def maker(self, model: LoadedModel) -> Callable[[torch.device], StepMemory]:
        """Makes empty memories for this model, given its device. Raises ValueError if the method cannot serve it."""

    def described(self, model: LoadedModel) -> str:
        """The method in words. Raises as `maker`."""
        return self.label

    def covers(self, index: int) -> bool:
        """Whether this step of the run may be left out."""
        return self.start_step <= index and (self.end_step < 0 or index <= self.end_step)


class StepMemory:
    """What one prediction remembers. A method overrides `whole` or `blocks`, and asks `may_skip` for every choice.

    Only a prediction that was made in the step before can be continued: guidance that comes and goes, and windows that
    move, start anew.
    """

    def __init__(self, cache: StepCache, device: torch.device) -> None:
        self.cache = cache
        self.device = device
        self.keeping = device if cache.cache_device == "main_device" else torch.device("cpu")
        self.skipped: list[int] = []
        self.steps = 0
        self._last: int | None = None
        self._residual: Tensor | None = None
        self.ranks: Ranks = ALONE

    def whole(self, latents: Tensor, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """The velocity for latents of the same shape, with `run` or without."""
        return run()

    def blocks(self, moment: Moment, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """The tokens behind all blocks, with `run` or without."""
        return run()

    def goes_on(self, step: Step) -> bool:
        """Whether the step before this one was seen, too; to be asked once a step."""
        follows = self._last is not None and step.in_run == self._last + 1
        self._last = step.in_run
        self.steps += 1
        return follows

    def may_skip(self, choice: bool) -> bool:
        """Whether the step is left out, where this process would choose so: all that share the forward do the same."""
        return self.ranks.agreed(choice)

    def run_and_keep(self, before: Tensor, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`, whose difference to `before` is remembered if the next step may be left out."""
        after = run()
        self._residual = (after - before).to(self.keeping) if self.cache.covers(step.in_run + 1) else None
        return after

    def skip(self, before: Tensor, step: Step) -> Tensor:
        """`before` with the remembered difference."""
        self.skipped.append(step.in_run)
        return before + self._residual.to(before.device)


class StepMemories:
    """The memories of a run or window, by prediction and by the part of it that this process has."""

    def __init__(self, label: str, make: Callable[[], StepMemory], ranks: Ranks = ALONE) -> None:
        self._label, self._make, self._ranks = label, make, ranks
        self._found: dict[tuple[Hashable, Hashable], StepMemory] = {}

    def of(self, prediction: Hashable) -> StepMemory:
        """The memory of this prediction, empty at first."""
        key = (prediction, self._ranks.layout)
        if key not in self._found:
            self._found[key] = self._make()
            self._found[key].ranks = self._ranks
        return self._found[key]

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()

    def report(self) -> None:
        """Log which steps were left out."""
        for (prediction, _), memory in self._found.items():
            log.info(
                "%s left out %d of %d steps (%s): %s.",
                self._label, len(memory.skipped), memory.steps, prediction, memory.skipped,
            )  # fmt: skip


def memories(cache: StepCache, model: LoadedModel, device: torch.device) -> StepMemories:
    """Empty memories for a run or window. Raises ValueError if the method cannot serve the model."""
    make = cache.maker(model)
    return StepMemories(cache.label, lambda: make(device), model.transformer.ranks)
