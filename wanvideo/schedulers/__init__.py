"""Noise schedules and solvers: sigma goes from 1 (noise) to 0 (video), the model's timestep is 1000 * sigma."""

from __future__ import annotations

from .for_other_packs import get_scheduler, scheduler_list
from .methods import SCHEDULERS, Method, add_methods, available, euler_solver, up_to
from .schedule import Schedule, ScheduleSpec, make_schedule
from .solver import FlowSolver, noise_like

__all__ = [
    "SCHEDULERS", "FlowSolver", "Method", "Schedule", "ScheduleSpec", "add_methods", "available", "euler_solver",
    "get_scheduler", "make_schedule", "noise_like", "scheduler_list", "up_to",
]  # fmt: skip
