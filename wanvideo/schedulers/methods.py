"""The sampler options: which grid and which diffusers solver each of them uses.

A system whose steps are its own brings the rows of them (`<system>/schedules.py`); `registry.py` adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...quiet_imports import kernels_hidden
from . import grids
from .grids import Grid

# The widget, as saved graphs know it.
SCHEDULERS: tuple[str, ...] = (
    "unipc",
    "unipc/beta",
    "dpm++",
    "dpm++/beta",
    "dpm++_sde",
    "dpm++_sde/beta",
    "euler",
    "euler/beta",
    "longcat_distill_euler",
    "deis",
    "lcm",
    "lcm/beta",
    "res_multistep",
    "er_sde",
    "flowmatch_causvid",
    "flowmatch_distill",
    "flowmatch_pusa",
    "multitalk",
    "sa_ode_stable",
    "rcm",
    "vibt_unipc",
)


class Solver(Protocol):
    """A diffusers scheduler whose sigmas and timesteps may be replaced."""

    sigmas: Tensor
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Reset the state."""

    def set_begin_index(self, begin_index: int) -> None:
        """The first step to take."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> tuple[Tensor, ...]:
        """Move `sample` one step; batch first."""


@functools.cache
def _class(name: str) -> Callable[..., Solver]:
    """A scheduler of diffusers, which is slow to load and therefore loaded when it is needed."""
    with kernels_hidden("diffusers"):
        import diffusers

        return getattr(diffusers, name)


def _solver(name: str, **options: str | bool) -> Callable[[], Solver]:
    return lambda: _class(name)(**options)


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_unipc = _solver("UniPCMultistepScheduler", **_FLOW)
_dpm = _solver("DPMSolverMultistepScheduler", **_FLOW)
_dpm_sde = _solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **_FLOW)
_deis = _solver("DEISMultistepScheduler", **_FLOW)
euler_solver = _solver("FlowMatchEulerDiscreteScheduler")
_lcm = _solver("FlowMatchLCMScheduler")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the option table.

    whole_timesteps: the model sees 1000 * sigma rounded down, as Wan's multistep solvers give it.
    limits: range that the solver's sigmas are clamped to, where its log-SNR must stay finite.
    noisy: the solver draws noise at every step. steps: the only step count, None for any.
    fixed_grid: custom sigmas are refused. for_loops: only for videos that are made in a loop of windows.
    times_frames: frames that are given before sampling stay as they are, and the model sees them at time 0.
    """

    grid: Callable[[int, float], Grid]
    solver: Callable[[], Solver]
    whole_timesteps: bool = False
    limits: tuple[float, float] = (0.0, 1.0)
    noisy: bool = False
    steps: int | None = None
    fixed_grid: bool = False
    for_loops: bool = False
    times_frames: bool = False

    def solver_for(self, sigmas: Tensor, timesteps: Tensor, first: int) -> Solver:
        """A fresh solver over the whole schedule (sigmas [n + 1], timesteps [n]) that starts at step `first`."""
        solver = self.solver()
        solver.set_timesteps(len(timesteps))
        solver.sigmas = sigmas.clamp(*self.limits)
        solver.timesteps = timesteps
        solver.set_begin_index(first)
        return solver

    def advance(
        self, solver: Solver, velocity: Tensor, *, timestep: Tensor, latents: Tensor, generator: torch.Generator
    ) -> Tensor:
        """One solver step of latents [C, F, H, W] along `velocity`; float32."""
        noise_source = {"generator": generator} if self.noisy else {}
        moved = solver.step(velocity.float()[None], timestep, latents.float()[None], return_dict=False, **noise_source)
        return moved[0][0]


def _beta(grid: Callable[[int, float], Grid]) -> Callable[[int, float], Grid]:
    return lambda steps, shift: grids.beta_spaced(grid(steps, shift))


def _method_rows() -> dict[str, Method]:
    below_one = 1 - 1e-6
    bases = {
        "unipc": Method(grid=grids.unipc_grid, solver=_unipc, whole_timesteps=True, limits=(0.0, below_one)),
        "dpm++": Method(grid=grids.dpm_grid, solver=_dpm, whole_timesteps=True),
        "dpm++_sde": Method(grid=grids.dpm_grid, solver=_dpm_sde, whole_timesteps=True, noisy=True),
        "euler": Method(grid=grids.euler_grid, solver=euler_solver),
        "lcm": Method(grid=grids.euler_grid, solver=_lcm, noisy=True),
    }
    rows = dict(bases)
    for name, row in bases.items():
        rows[f"{name}/beta"] = replace(row, grid=_beta(row.grid))
    rows["deis"] = Method(grid=grids.unipc_grid, solver=_deis, whole_timesteps=True, limits=(1e-6, below_one))
    rows["flowmatch_distill"] = Method(grid=grids.distill_grid, solver=euler_solver, steps=4, fixed_grid=True)
    return rows


METHODS: dict[str, Method] = _method_rows()


def add_methods(rows: Mapping[str, Method]) -> None:
    """Rows of a system's own."""
    METHODS.update(rows)


def available() -> tuple[str, ...]:
    """The options that run, in the order of the widget."""
    return tuple(name for name in SCHEDULERS if name in METHODS)


def method_of(name: str) -> Method:
    """The row of `name`; ValueError, listing what works, if there is none."""
    if name not in METHODS:
        raise ValueError(f"The scheduler '{name}' is not available; choose one of: {', '.join(available())}.")
    return METHODS[name]
