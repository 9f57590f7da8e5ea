"""What ComfyUI's sigma schedulers (BasicScheduler) ask of a model, without a model: its flow-matching noise levels."""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import TRAIN_STEPS


class FlowSampling:
    """Noise levels under `shift`, with the surface of ComfyUI's `model_sampling`. Raises ValueError for shift <= 0."""

    def __init__(self, shift: float) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be above 0, not {shift}.")
        self.shift, self.multiplier = shift, TRAIN_STEPS
        self.sigmas = self.sigma(torch.arange(1, TRAIN_STEPS + 1))

    @property
    def sigma_min(self) -> Tensor:
        """The lowest noise level of the training, 0-d."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The highest one, 1."""
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        """0..1000."""
        return sigma * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        """The shifted noise level, 0..1, of a timestep."""
        return self._shifted(timestep / self.multiplier)

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at this share of the run, from 1 at 0 to 0 at 1."""
        return self._shifted(1.0 - min(max(percent, 0.0), 1.0))

    def _shifted(self, t: Tensor | float) -> Tensor | float:
        return self.shift * t / (1 + (self.shift - 1) * t)


class FlowModel:
    """A MODEL that has noise levels and nothing else."""

    def __init__(self, shift: float) -> None:
        self._sampling = FlowSampling(shift)

    def get_model_object(self, name: str) -> FlowSampling:
        """Its `model_sampling`. Raises ValueError for any other part."""
        if name != "model_sampling":
            raise ValueError(
                f"'Dummy Comfy Wan Model Object' has no '{name}': it gives noise levels to schedulers such as "
                "BasicScheduler, and cannot sample."
            )
        return self._sampling
