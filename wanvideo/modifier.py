"""What changes how a run is sampled without being read by the model: loops over runs, velocities, guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from torch import Generator, Tensor

from .conditioning import Row, Step

if TYPE_CHECKING:
    from .schedulers import Schedule

# (latents [C, F, H, W], timestep, step) -> velocity [C, F, H, W]
Velocity = Callable[[Tensor, Tensor, Step], Tensor]
# (rows, one prediction [C, F, H, W] float32 for each, step) -> guided velocity
Combine = Callable[[Sequence[Row], Sequence[Tensor], Step], Tensor]
# (SampleRequest, Host) -> the two LATENT dicts of the sampler
Run = Callable[..., tuple[dict[str, object], dict[str, object]]]


class LatentHook(Protocol):
    """Changes latents [C, F, H, W] around a step. index counts from 0 in the run; return new latents or the same."""

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Latents at schedule.sigmas[index], before the model and the solver see them."""

    def after(self, latents: Tensor, index: int) -> Tensor:
        """Latents at schedule.sigmas[index + 1], after the solver's step."""


class Start(NamedTuple):
    """What a run starts from; latents are [C, F, H, W] float32.

    latents to begin with; noise: what was drawn for all frames; hooks around every step, in order; frame_times: as in
    `denoise`; original: the video under a mask.
    """

    latents: Tensor
    noise: Tensor
    hooks: tuple[LatentHook, ...] = ()
    frame_times: Mapping[int, float] = MappingProxyType({})
    original: Tensor | None = None


class Modifier:
    """Base of what a node connects to the sampler to change a run. Subclasses override what they need.

    Several nest: the first in the request is the outermost. replaces_start: `begin` puts other latents in the place of
    those that it is given, so that what refines a run's start has no effect.
    """

    replaces_start: ClassVar[bool] = False

    def around_run(self, run: Run) -> Run:
        """A run in the place of `run`, which it may call any number of times with changed requests."""
        return run

    def begin(self, start: Start, schedule: Schedule, generator: Generator) -> Start:
        """What the run starts from instead of `start`. generator: the run's, which solvers draw from, too."""
        return start

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The guided velocity of the whole video, made from `velocity`."""
        return velocity

    def around_guidance(self, combine: Combine) -> Combine:
        """How the predictions of a step's passes become one velocity; `combine` is their weighted sum."""
        return combine
