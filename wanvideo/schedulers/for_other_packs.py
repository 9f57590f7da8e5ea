"""Schedules under the names of the original pack's module, which nodes of other packs call (ComfyUI-TripleKSampler's).

shift, steps and sigmas are those of the sampler node; sigma goes from 1 (noise) to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .methods import SCHEDULERS, WIDE
from .schedule import Schedule, ScheduleSpec, make_schedule

scheduler_list = list(SCHEDULERS)


def get_scheduler(
    scheduler: str,
    steps: int,
    start_step: int,
    end_step: int,
    shift: float,
    device: torch.device | None = None,
    transformer_dim: int = WIDE,
    denoise_strength: float = 1.0,
    sigmas: Tensor | None = None,
) -> tuple[Schedule, Tensor, int, int]:
    """The schedule with its `sigmas` [n + 1], its timesteps [n] on `device`, and its first and last step in the whole.

    Raises ValueError as `make_schedule`.
    """
    spec = ScheduleSpec(
        name=scheduler, steps=steps, shift=shift, sigmas=sigmas, denoise_strength=denoise_strength,
        start_step=start_step, end_step=end_step, width=transformer_dim,
    )  # fmt: skip
    schedule = make_schedule(spec)
    return schedule, schedule.timesteps.to(device), schedule.first_index, schedule.first_index + len(schedule) - 1
