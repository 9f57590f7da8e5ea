"""The steps of ViBT models, which go from the source video, given as samples, to the video that is made.

Sources: Tan et al. 2025, Vision Bridge Transformer at Scale; Yuanshi9815/ViBT (vibt/scheduler.py).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..wanvideo.schedulers import FlowSolver, Method, noise_like
from ..wanvideo.schedulers.grids import LAST_TRAINED, Grid, deis_grid
from ..wanvideo.schedulers.methods import exact, whole


def bridge_grid(steps: int, shift: float) -> Grid:
    """Times from 1 (the source) on: those of diffusers' UniPC and DEIS in whole timesteps, each counted to its end."""
    return (whole(deis_grid(steps, shift)) + 1) * LAST_TRAINED


def begun(grid: Grid) -> Grid:
    """The timesteps that end at these times: 999 at time 1."""
    return np.maximum(exact(grid) - 1, 0)


class BridgeSolver(FlowSolver):
    """Euler's steps with the noise of a Brownian bridge (variance-corrected sampling), which is none at either end."""

    def move(self, latents: Tensor, velocity: Tensor, sigma: float, after: float, generator: torch.Generator) -> Tensor:
        """Noise is drawn in the last step, too, where it counts nothing."""
        spread = math.sqrt((sigma - after) * after / sigma)
        return latents + (after - sigma) * velocity + spread * noise_like(latents, generator)


SCHEDULES = {"vibt_unipc": Method(grid=bridge_grid, solver=BridgeSolver, timesteps=begun)}
