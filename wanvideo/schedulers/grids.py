"""Sigma grids, float64, from the first sigma to the last one before zero; `steps` values each.

Sources: Wan-Video/Wan2.2 (wan/utils), huggingface/diffusers (FlowMatchEulerDiscreteScheduler), ModelTC/LightX2V
(distilled models), tianweiy/CausVid, NVlabs/rcm, modelscope/DiffSynth-Studio (picked levels), eddyhhlure1Eddy/
ode-ComfyUI-WanVideoWrapper (settling), Lee et al. 2024 (beta sampling).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float64]

TRAIN_STEPS = 1000
LAST_TRAINED = 1 / TRAIN_STEPS
BETA = 0.6
DISTILLED = (0.999, 0.75, 0.5, 0.25)
CAUSVID_14B = (0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074)
CAUSVID = (1.0, 0.75, 0.5, 0.25)
# Angles of TrigFlow; the first is that of noise 120 times as strong as the video.
RCM = (np.arctan(120), 1.5, 1.4, 1.0)
LOWEST_PICKED = 0.003 / 1.002
MOST_UNIFORM = 10


def shifted(sigmas: Grid, shift: float) -> Grid:
    """Timestep shift of flow matching (Esser et al. 2024): more steps at high noise for shift above 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def wan_grid(steps: int, shift: float) -> Grid:
    """Wan's UniPC and DPM-Solver++: uniform from the shifted noise level below 1, then shifted once more.

    Wan's own runs shift that level once. Saved graphs were tuned on this grid, its first level in 32 bits: timesteps,
    which are rounded down, count on what that is above 0.999.
    """
    top = shifted(np.array([1 - LAST_TRAINED], dtype=np.float32), np.float32(shift))
    return shifted(np.linspace(float(top[0]), 0, steps + 1)[:-1], shift)


def deis_grid(steps: int, shift: float) -> Grid:
    """DEIS: uniform from the last trained noise level below 1, then shifted.

    In diffusers' order of operations, since whole timesteps are rounded down.
    """
    return shifted((1 - np.linspace(1, LAST_TRAINED, steps + 1))[:0:-1], shift)


def uniform_grid(steps: int, shift: float) -> Grid:
    """Uniform from 1, then shifted."""
    return shifted(np.linspace(1, 0, steps + 1)[:-1], shift)


def euler_grid(steps: int, shift: float) -> Grid:
    """Diffusers' flow-matching Euler and LCM: from 1 to the shifted smallest trained sigma, then shifted once more.

    The last step is therefore a small one. Saved graphs were tuned on this grid.
    """
    last = shifted(np.array([LAST_TRAINED]), shift)[0]
    return shifted(np.linspace(1, last, steps), shift)


def distill_grid(steps: int, shift: float) -> Grid:
    """The four noise levels that step-distilled models were trained on, shifted."""
    return shifted(np.array(DISTILLED[:steps]), shift)


def causvid_grid(steps: int, shift: float) -> Grid:
    """The first of the nine noise levels that CausVid of 14B was trained on, which are shifted already."""
    return np.array(CAUSVID_14B[:steps])


def small_causvid_grid(steps: int, shift: float) -> Grid:
    """The four noise levels of CausVid of 1.3B, which are shifted already."""
    return np.array(CAUSVID[:steps])


def rcm_grid(steps: int, shift: float) -> Grid:
    """The first noise levels of rCM, of which any number of steps takes the leading ones; nothing is shifted."""
    angles = np.array(RCM[:steps])
    return np.sin(angles) / (np.cos(angles) + np.sin(angles))


def picked_grid(steps: int, shift: float) -> Grid:
    """Every so many of a thousand noise levels from 1 down to nearly 0, then shifted."""
    levels = np.linspace(1, LOWEST_PICKED, TRAIN_STEPS)
    return shifted(levels[np.round(np.arange(steps) * (TRAIN_STEPS / steps)).astype(int)], shift)


def settling_grid(steps: int, shift: float) -> Grid:
    """Uniform for few steps, for more of them half a wave of the cosine: small steps at both ends. Then shifted."""
    if steps <= MOST_UNIFORM:
        return uniform_grid(steps, shift)
    return shifted((1 + np.cos(np.pi * np.arange(steps) / steps)) / 2, shift)


def beta_spaced(grid: Grid) -> Grid:
    """The same range with quantiles of Beta(0.6, 0.6) between: more steps at both ends."""
    from scipy.stats import beta

    quantiles = beta.ppf(1 - np.linspace(0, 1, len(grid)), BETA, BETA)
    return grid[-1] + quantiles * (grid[0] - grid[-1])


def finer_tail(grid: Grid) -> Grid:
    """Steps below half of the first sigma replaced by a uniform tail (`enhance_hf`), for high-frequency detail.

    The tail has a fifth of the steps, at least 3 and at most 15.
    """
    split = grid.max() / 2
    count = max(3, min(15, int(len(grid) * 0.2)))
    return np.concatenate([grid[grid > split], np.linspace(split, 0, count, endpoint=False, dtype=grid.dtype)])
