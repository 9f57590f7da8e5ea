"""What takes the steps of a run: the contract, the base of this package's own solvers, and diffusers' solvers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...quiet_imports import kernels_hidden


class Solver(Protocol):
    """Takes the steps of one run in their order."""

    def step(self, velocity: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The latents one step further; both of one shape, float32. generator: on the CPU, for solvers that draw."""


# From sigmas [n + 1] and timesteps [n] of the whole schedule, and the index of the step that is taken first.
MakeSolver = Callable[[Tensor, Tensor, int], Solver]


class FlowSolver(ABC):
    """Base of solvers that need noise levels alone; they keep what they remember of earlier steps.

    sigmas [n + 1]: of the whole schedule; first: the index of the step that is taken first.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, first: int) -> None:
        self.total = len(timesteps)
        self._sigmas, self._index = sigmas.tolist(), first

    def step(self, velocity: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """As Solver's."""
        sigma, after = self._sigmas[self._index : self._index + 2]
        self._index += 1
        return self.move(latents, velocity, sigma, after, generator)

    @abstractmethod
    def move(self, latents: Tensor, velocity: Tensor, sigma: float, after: float, generator: torch.Generator) -> Tensor:
        """The latents, moved from noise level sigma down to `after`."""


def noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed gives the same video on every device."""
    return torch.randn(latents.shape, generator=generator).to(latents)


@functools.cache
def _class(name: str) -> Callable[..., object]:
    """A scheduler of diffusers, which is slow to load and therefore loaded when it is needed."""
    with kernels_hidden("diffusers"):
        import diffusers

        return getattr(diffusers, name)


class DiffusersSolver:
    """A scheduler of diffusers over a schedule that is not its own.

    limits: range that its sigmas are clamped to, where its log-SNR must stay finite. noisy: it draws at every step.
    """

    def __init__(
        self,
        scheduler: object,
        schedule: tuple[Tensor, Tensor, int],
        limits: tuple[float, float],
        noisy: bool,
    ) -> None:
        sigmas, timesteps, first = schedule
        scheduler.set_timesteps(len(timesteps))
        scheduler.sigmas = sigmas.clamp(*limits)
        scheduler.timesteps = timesteps
        scheduler.set_begin_index(first)
        self._scheduler, self._noisy = scheduler, noisy
        self._timesteps = iter(timesteps[first:])

    def step(self, velocity: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """As Solver's."""
        source = {"generator": generator} if self._noisy else {}
        timestep = next(self._timesteps)
        return self._scheduler.step(velocity[None], timestep, latents[None], return_dict=False, **source)[0][0]


def diffusers_solver(
    name: str, limits: tuple[float, float] = (0.0, 1.0), noisy: bool = False, **options: str | bool
) -> MakeSolver:
    """Makes solvers of diffusers' scheduler of this name. options: its own; the others as in DiffusersSolver."""

    def make(sigmas: Tensor, timesteps: Tensor, first: int) -> DiffusersSolver:
        return DiffusersSolver(_class(name)(**options), (sigmas, timesteps, first), limits, noisy)

    return make
