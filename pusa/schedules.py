"""The steps of Pusa, whose given frames have times of their own (Yaofang-Liu/Pusa-VidGen)."""

from __future__ import annotations

from ..wanvideo.schedulers import Method, euler_solver
from ..wanvideo.schedulers.grids import dpm_grid

SCHEDULES = {"flowmatch_pusa": Method(grid=dpm_grid, solver=euler_solver, times_frames=True)}
