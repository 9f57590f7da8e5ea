"""The steps of InfiniteTalk's loop of windows.

Source: MeiGen-AI/InfiniteTalk (wan/multitalk.py).
"""

from __future__ import annotations

import numpy as np

from ..wanvideo.schedulers import Method, euler_solver
from ..wanvideo.schedulers.grids import LAST_TRAINED, Grid, shifted


def multitalk_grid(steps: int, shift: float) -> Grid:
    """Uniform from timestep 1000 to 1, then shifted."""
    return shifted(np.linspace(1, LAST_TRAINED, steps), shift)


SCHEDULES = {"multitalk": Method(grid=multitalk_grid, solver=euler_solver, for_loops=True)}
