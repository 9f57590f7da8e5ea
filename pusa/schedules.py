"""The steps of Pusa, whose given frames have times of their own (Yaofang-Liu/Pusa-VidGen)."""

from __future__ import annotations

from ..wanvideo.schedulers import Method, euler_solver
from ..wanvideo.schedulers.grids import uniform_grid

SCHEDULES = {"flowmatch_pusa": Method(grid=uniform_grid, solver=euler_solver, times_frames=True)}
