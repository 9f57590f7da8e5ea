"""Noise schedules and solvers: sigma goes from 1 (noise) to 0 (video), the model's timestep is 1000 * sigma."""

from __future__ import annotations

from .methods import SCHEDULERS, Method, add_methods, available, euler_solver
from .schedule import Schedule, ScheduleSpec, make_schedule

__all__ = [
    "SCHEDULERS", "Method", "Schedule", "ScheduleSpec", "add_methods", "available", "euler_solver", "make_schedule",
]  # fmt: skip
