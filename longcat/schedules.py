"""The steps of LongCat's distilled LoRA.

Source: meituan-longcat/LongCat-Video (longcat_video/pipeline_longcat_video.py).
"""

from __future__ import annotations

import numpy as np

from ..wanvideo.schedulers import Method, euler_solver, up_to
from ..wanvideo.schedulers.grids import Grid, shifted

TRAINED_STEPS = 50


def distill_grid(steps: int, shift: float) -> Grid:
    """Steps out of the fifty that the LoRA was trained on, as evenly as whole numbers allow, shifted."""
    trained = np.arange(TRAINED_STEPS, 0, -1) / TRAINED_STEPS
    return shifted(trained[np.floor(np.linspace(0, TRAINED_STEPS, steps + 1)[:-1]).astype(int)], shift)


SCHEDULES = {"longcat_distill_euler": Method(grid=distill_grid, solver=euler_solver, steps=up_to(TRAINED_STEPS))}
