"""What changes how a run is sampled without being read by the model: loops over runs, velocities, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .conditioning import Row, Step

# (latents [C, F, H, W], timestep, step) -> velocity [C, F, H, W]
Velocity = Callable[[Tensor, Tensor, Step], Tensor]
# (rows, one prediction [C, F, H, W] float32 for each, step) -> guided velocity
Combine = Callable[[Sequence[Row], Sequence[Tensor], Step], Tensor]
# (SampleRequest, Host) -> the two LATENT dicts of the sampler
Run = Callable[..., tuple[dict[str, object], dict[str, object]]]


class Modifier:
    """Base of what a node connects to the sampler to change a run. Subclasses override what they need.

    Several nest: the first in the request is the outermost.
    """

    def around_run(self, run: Run) -> Run:
        """A run in the place of `run`, which it may call any number of times with changed requests."""
        return run

    def around_velocity(self, velocity: Velocity) -> Velocity:
        """The guided velocity of the whole video, made from `velocity`."""
        return velocity

    def around_guidance(self, combine: Combine) -> Combine:
        """How the predictions of a step's passes become one velocity; `combine` is their weighted sum."""
        return combine
