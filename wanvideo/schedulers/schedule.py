"""A schedule is a grid of sigmas, the part of it that a sampler runs, and the solver's state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..conditioning import Step
from .grids import TRAIN_STEPS, Grid, finer_tail
from .methods import Method, exact, method_of, whole
from .solver import Solver


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What the sampler node asks for.

    sigmas: custom sigmas [steps + 1], falling, in 0..1; they replace `steps` and `shift`.
    denoise_strength: below 1 starts later in the schedule (video to video).
    start_step, end_step: an int counts steps (end_step -1: to the end); a float is a sigma: steps at or below it
    (start) or above it (end) are run, so that two samplers with one boundary continue each other.
    enhance_hf: a finer uniform tail at low noise. width: of the model; None, where it is not known, means 14B.
    """

    name: str
    steps: int
    shift: float
    sigmas: Tensor | None = None
    denoise_strength: float = 1.0
    start_step: int | float = 0
    end_step: int | float = -1
    enhance_hf: bool = False
    width: int | None = None


class Schedule:
    """The steps of one sampler run and the solver that takes them.

    sigmas [n + 1] and timesteps [n] (float32, CPU) are the part that is run; first_index is where it starts in the
    whole schedule of `total` steps. A solver that remembers nothing (euler, lcm, rcm) split in two runs equals
    the single run; a multistep solver starts its history anew at the split.
    """

    def __init__(self, spec: ScheduleSpec, grid: Grid, last: float, span: range) -> None:
        self.spec = spec
        self.total = len(grid)
        self.first_index = span.start
        self._method = method_of(spec.name, spec.width)
        self._grid, self._last, self._span = grid, last, span
        self._all_sigmas = torch.from_numpy(np.append(grid, last).astype(np.float32))
        self._all_timesteps = _timesteps(grid, self._method, finer=spec.enhance_hf)
        self.sigmas = self._all_sigmas[span.start : span.stop + 1]
        self.timesteps = self._all_timesteps[span.start : span.stop]
        self._solver: Solver | None = None
        self._next = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def for_loops(self) -> bool:
        """Whether it is only for videos that are made in a loop of windows."""
        return self._method.for_loops

    @property
    def times_frames(self) -> bool:
        """Whether frames that are given before sampling have a time of their own."""
        return self._method.times_frames

    @property
    def all_sigmas(self) -> Tensor:
        """Sigmas of the whole schedule [total + 1]."""
        return self._all_sigmas

    @property
    def all_timesteps(self) -> Tensor:
        """Timesteps of the whole schedule [total]."""
        return self._all_timesteps

    def for_width(self, width: int) -> Schedule:
        """The same schedule for a model of this width. Raises ValueError for steps that it has not."""
        same = method_of(self.spec.name, width) is self._method
        return self if same else make_schedule(replace(self.spec, width=width))

    def level(self, index: int) -> Tensor:
        """The noise level before a step of this run as the model is told it: rounded down where timesteps are.

        index: of the step; of as many as there are, the level behind the last one.
        """
        return self.timesteps[index] / TRAIN_STEPS if index < len(self) else self.sigmas[-1]

    def from_noise(self, noise: Tensor) -> Tensor:
        """What a run that begins with noise alone (standard normal, any shape) begins with."""
        return noise * self.sigmas[0] if self._method.scales_noise else noise

    def later(self, steps: int) -> Schedule:
        """The same schedule without the first `steps` of this run. Raises ValueError where none is left."""
        if steps >= len(self):
            raise ValueError(f"None of {len(self)} steps is left behind the first {steps}: start earlier.")
        return Schedule(self.spec, self._grid, self._last, self._span[steps:])

    def places(self) -> tuple[Step, ...]:
        """Where each step of the run is."""
        steps = range(len(self))
        return tuple(Step(index=self.first_index + i, total=self.total, in_run=i) for i in steps)

    def fresh(self) -> Schedule:
        """The same schedule with no solver history."""
        return Schedule(self.spec, self._grid, self._last, self._span)

    def step(self, velocity: Tensor, index: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Move latents [C, F, H, W] from sigmas[index] to sigmas[index + 1] along `velocity` (same shape).

        index counts from 0 within this run, in order. generator: CPU generator for solvers that draw noise.
        Returns float32. Raises ValueError if a step is skipped or repeated.
        """
        if index != self._next:
            raise ValueError(f"Step {index} was asked for where {self._next} is due; use fresh() to start over.")
        if self._solver is None:
            self._solver = self._method.solver(self._all_sigmas, self._all_timesteps, self.first_index)
        self._next += 1
        return self._solver.step(velocity.float(), latents.float(), generator)


def make_schedule(spec: ScheduleSpec) -> Schedule:
    """The schedule that `spec` describes.

    Raises ValueError for a scheduler that is not available, for sigmas that are not usable, and for an empty range.
    """
    method = method_of(spec.name, spec.width)
    grid, last = _whole_grid(spec, method)
    if spec.enhance_hf:
        seen = whole(grid) / TRAIN_STEPS if method.timesteps is whole else grid
        grid, last = finer_tail(seen), 0.0
    start = _start(spec, grid, last)
    stop = _stop(spec, grid)
    if start >= stop:
        if spec.denoise_strength < 1:
            raise ValueError(
                f"denoise_strength {spec.denoise_strength} begins at step {start} of {len(grid)}, behind end_step "
                f"{spec.end_step}: raise one of them."
            )
        raise ValueError(
            f"No steps are left between start_step {spec.start_step} and end_step {spec.end_step} of {len(grid)} "
            "steps; start_step must come before end_step."
        )
    return Schedule(spec, grid, last, range(start, stop))


def _whole_grid(spec: ScheduleSpec, method: Method) -> tuple[Grid, float]:
    if spec.sigmas is not None:
        if method.fixed_grid:
            raise ValueError(f"The scheduler '{spec.name}' has its own sigmas; disconnect 'sigmas'.")
        return _custom_grid(spec.sigmas)
    if spec.steps < 1:
        raise ValueError(f"steps must be at least 1, not {spec.steps}.")
    if method.steps is not None and spec.steps not in method.steps:
        most = f"{method.steps[-1]} steps {'only' if len(method.steps) == 1 else 'at most'}"
        model = "" if spec.width is None else f" in a model of width {spec.width}"
        raise ValueError(f"The scheduler '{spec.name}' works with {most}{model}, not {spec.steps}: change steps.")
    if spec.shift <= 0:
        raise ValueError(f"shift must be above 0, not {spec.shift}.")
    return method.grid(spec.steps, spec.shift), 0.0


def _custom_grid(sigmas: Tensor) -> tuple[Grid, float]:
    values = sigmas.detach().cpu().float().numpy()
    falling = values.ndim == 1 and len(values) >= 2 and bool(np.all(values[1:] < values[:-1]))
    if not falling or values[0] > 1 or values[-1] < 0:
        raise ValueError(
            "Custom sigmas must be at least two values that fall from at most 1 to at least 0 (flow matching), "
            f"but they are {np.round(values, 4).tolist()}."
        )
    return values[:-1], float(values[-1])


def _timesteps(grid: Grid, method: Method, *, finer: bool) -> Tensor:
    """Those of a finer tail are not rounded, as saved graphs have it."""
    timesteps = exact if finer and method.timesteps is whole else method.timesteps
    return torch.from_numpy(timesteps(grid).astype(np.float32))


def _start(spec: ScheduleSpec, grid: Grid, last: float) -> int:
    if spec.denoise_strength < 1:
        if spec.start_step != 0:
            raise ValueError("start_step must be 0 when denoise_strength is below 1; it sets the start itself.")
        return len(grid) - int(len(grid) * spec.denoise_strength) - 1
    if isinstance(spec.start_step, float):
        reached = np.flatnonzero(np.append(grid, last) <= spec.start_step)
        return int(reached[0]) if len(reached) else 0
    return max(spec.start_step, 0)


def _stop(spec: ScheduleSpec, grid: Grid) -> int:
    if isinstance(spec.end_step, float):
        above = np.flatnonzero(grid > spec.end_step)
        return int(above[-1]) + 1 if len(above) else 0
    return len(grid) if spec.end_step < 0 else min(spec.end_step, len(grid))
