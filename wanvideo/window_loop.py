"""Videos that are made window by window, each from the end of the one before: what such loops have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .request import SampleRequest
from .sampling import RunWatcher, check_conditions

if TYPE_CHECKING:
    from ..host import Host
    from .modules.vae import WanVAE


def check_windows(request: SampleRequest, *, asked_by: str, remedy: str) -> None:
    """Raises ValueError for what no such loop takes.

    asked_by: the option that asks for windows; remedy: how to do without them.
    """
    check_conditions(request)
    if request.context is not None:
        raise ValueError(
            f"context_options and {asked_by} are two ways to make a long video: disconnect the options, or {remedy}."
        )
    if (request.samples or {}).get("samples") is not None or request.image.given_latents:
        raise ValueError(
            f"With {asked_by} the sampler takes no samples and no extra latents: disconnect them, or {remedy}."
        )
    if request.schedule.for_loops:
        raise ValueError(
            f"The scheduler '{request.schedule.spec.name}' is not for {asked_by}: choose another, or {remedy}."
        )


def make_windows(
    request: SampleRequest,
    host: Host,
    frames: Callable[[int, RunWatcher], Tensor],
    *,
    count: int,
    size: Sequence[int],
    vae: WanVAE,
) -> list[Tensor]:
    """What `frames` makes for windows 0 to count - 1, under one progress bar; frees the GPU in the end.

    size: of the latents of a forward (frames, height, width).
    """
    steps = len(request.schedule)
    request.model.try_attention(size, request.guidance.most_passes(steps))
    try:
        with host.progress(count * steps, "Sampling") as progress:
            watcher = RunWatcher(host, progress, request.set_step)
            return [frames(index, watcher) for index in range(count)]
    finally:
        vae.managed.release()
        if request.force_offload:
            request.model.managed.release()
