"""The sampler options: which grid and which solver each of them uses.

A system whose steps are its own brings the rows of them (`<system>/schedules.py`); `registry.py` adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from . import grids
from .er_sde import ErSde
from .grids import TRAIN_STEPS, Grid
from .res_multistep import ResMultistep
from .sa_ode import StableOde
from .solver import MakeSolver, diffusers_solver

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

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
BELOW_ONE = 1 - 1e-6
_unipc = diffusers_solver("UniPCMultistepScheduler", limits=(0.0, BELOW_ONE), **_FLOW)
_dpm = diffusers_solver("DPMSolverMultistepScheduler", **_FLOW)
_dpm_sde = diffusers_solver("DPMSolverMultistepScheduler", noisy=True, algorithm_type="sde-dpmsolver++", **_FLOW)
_deis = diffusers_solver("DEISMultistepScheduler", limits=(1e-6, BELOW_ONE), **_FLOW)
euler_solver = diffusers_solver("FlowMatchEulerDiscreteScheduler")
_lcm = diffusers_solver("FlowMatchLCMScheduler", noisy=True)

# The width of 14B models.
WIDE = 5120


def exact(grid: Grid) -> Grid:
    """Timesteps of noise levels: 1000 * sigma."""
    return grid * TRAIN_STEPS


def whole(grid: Grid) -> Grid:
    """Timesteps rounded down, as Wan's multistep solvers give them to the model."""
    return np.trunc(exact(grid))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the option table.

    timesteps: what the model sees of a grid. steps: the step counts that it has, None for any.
    fixed_grid: custom sigmas are refused. small: the row for models narrower than those of 14B, where that is another.
    scales_noise: a run from noise alone begins with as much of it as the first noise level says, where it is below 1.
    for_loops: only for videos that are made in a loop of windows.
    times_frames: frames that are given before sampling stay as they are, and the model sees them at time 0.
    """

    grid: Callable[[int, float], Grid]
    solver: MakeSolver
    timesteps: Callable[[Grid], Grid] = exact
    steps: range | None = None
    fixed_grid: bool = False
    small: Method | None = None
    scales_noise: bool = False
    for_loops: bool = False
    times_frames: bool = False


def up_to(steps: int) -> range:
    """For schedules of so many steps at most."""
    return range(1, steps + 1)


def _beta(grid: Callable[[int, float], Grid]) -> Callable[[int, float], Grid]:
    return lambda steps, shift: grids.beta_spaced(grid(steps, shift))


def _method_rows() -> dict[str, Method]:
    bases = {
        "unipc": Method(grid=grids.wan_grid, solver=_unipc, timesteps=whole),
        "dpm++": Method(grid=grids.wan_grid, solver=_dpm, timesteps=whole),
        "dpm++_sde": Method(grid=grids.wan_grid, solver=_dpm_sde, timesteps=whole),
        "euler": Method(grid=grids.euler_grid, solver=euler_solver),
        "lcm": Method(grid=grids.euler_grid, solver=_lcm),
    }
    rows = dict(bases)
    for name, row in bases.items():
        rows[f"{name}/beta"] = replace(row, grid=_beta(row.grid))
    rows["deis"] = Method(grid=grids.deis_grid, solver=_deis, timesteps=whole)
    rows["res_multistep"] = Method(grid=grids.picked_grid, solver=ResMultistep, steps=up_to(TRAIN_STEPS))
    rows["er_sde"] = Method(grid=grids.picked_grid, solver=ErSde, steps=up_to(TRAIN_STEPS))
    rows["sa_ode_stable"] = Method(grid=grids.settling_grid, solver=StableOde)
    four = Method(grid=grids.distill_grid, solver=euler_solver, steps=range(4, 5), fixed_grid=True)
    rows["flowmatch_distill"] = four
    rows["flowmatch_causvid"] = Method(
        grid=grids.causvid_grid,
        solver=euler_solver,
        steps=up_to(len(grids.CAUSVID_14B)),
        fixed_grid=True,
        small=replace(four, grid=grids.small_causvid_grid),
    )
    rows["rcm"] = Method(grid=grids.rcm_grid, solver=_lcm, steps=up_to(len(grids.RCM)), scales_noise=True)
    return rows


METHODS: dict[str, Method] = _method_rows()


def add_methods(rows: Mapping[str, Method]) -> None:
    """Rows of a system's own."""
    METHODS.update(rows)


def available() -> tuple[str, ...]:
    """The options that run, in the order of the widget."""
    return tuple(name for name in SCHEDULERS if name in METHODS)


def method_of(name: str, width: int | None = None) -> Method:
    """The row of `name` for models of this width (None: those of 14B); ValueError, listing all, if there is none."""
    if name not in METHODS:
        raise ValueError(f"The scheduler '{name}' is not available; choose one of: {', '.join(available())}.")
    row = METHODS[name]
    return row if row.small is None or (width or WIDE) >= WIDE else row.small
