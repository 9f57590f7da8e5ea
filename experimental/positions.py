"""Positions that turn slower or faster, for videos larger or longer than those of the training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..wanvideo.modifier import Modifier, Run
from ..wanvideo.request import Latent, SampleRequest

if TYPE_CHECKING:
    from ..host import Host


@dataclass(frozen=True)
class ScaledPositions(Modifier):
    """NTK-aware scaling as in CineScale (Qiu et al. 2025): factors on the rotary base of time, height and width.

    References beside the video turn with it. Raises ValueError for a factor that is not above 0.
    """

    time: float = 1.0
    height: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        if min(self.time, self.height, self.width) <= 0:
            raise ValueError("ntk_scale_f, ntk_scale_h and ntk_scale_w must be more than 0; 1 changes nothing.")

    def around_run(self, run: Run) -> Run:
        """With the model's positions scaled."""
        return partial(self._scaled, run)

    def _scaled(self, run: Run, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        with request.model.transformer.turning((self.time, self.height, self.width)):
            return run(request, host)
