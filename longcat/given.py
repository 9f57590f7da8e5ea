"""Frames of a LongCat video that are known before it is made, and a reference in front that is no part of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.latents import GivenLatents
from ..wanvideo.modifier import Modifier, Run, Start
from ..wanvideo.request import SampleRequest
from ..wanvideo.sampling import noise_shape
from ..wanvideo.schedulers import Schedule


@dataclass(frozen=True, kw_only=True)
class GivenFrames(Payload):
    """Latent frames at the start of a run that are given: they see each other alone, and no prompt.

    frames: how many, a reference among them. apart: how many of those, at the start, see nothing but themselves, and
    are not seen by the others. position: of a reference in front, in latent frames of the video; None without one.
    unseeing: the frames, first and last + 1, that do not see those that are apart.
    """

    frames: int
    apart: int = 0
    position: int | None = None
    unseeing: tuple[int, int] | None = None
    needs: ClassVar[str] = "Frames that a video goes on from in LongCat's way need a LongCat model: load one."

    def window(self, window: Window) -> Self:
        """Itself. Raises ValueError for a part of the video."""
        if not window.whole:
            raise ValueError(
                "LongCat goes on from given frames in one run, not in context windows: disconnect the context options."
            )
        return self


@dataclass(frozen=True)
class Continuation(Modifier):
    """A run behind given latents [C, n, H, W] that stay as they are, at time 0.

    reference [C, 1, H, W]: one more in front of the video, which is cut off in the end.
    """

    given: Tensor | None
    reference: Tensor | None = None

    def around_run(self, run: Run) -> Run:
        """Without the reference in the result."""
        if self.reference is None:
            return run

        def cut(request: SampleRequest, host: object) -> tuple[dict[str, object], dict[str, object]]:
            return tuple({**latent, "samples": latent["samples"][:, :, 1:]} for latent in run(request, host))

        return cut

    def begin(self, start: Start, schedule: Schedule, generator: Generator) -> Start:
        """With what is given in place, and held there."""
        parts = [part.float() for part in (self.reference, self.given) if part is not None]
        if self.reference is not None:
            if start.original is not None:
                raise ValueError("A mask and a reference latent of LongCat do not go together: disconnect one of them.")
            front = parts[0].to(start.latents)
            start = start._replace(
                latents=torch.cat((front, start.latents), dim=1), noise=torch.cat((front, start.noise), dim=1)
            )
        held = GivenLatents.placed([(0, torch.cat(parts, dim=1))], start.latents.shape)
        latents = held.before(start.latents, 0) if schedule.first_index == 0 else start.latents
        return start._replace(latents=latents, hooks=(*start.hooks, held), frame_times=dict.fromkeys(held.frames, 0.0))


class GoesOn(Modifier):
    """The `extra_latents` of a LongCat model are the frames that it goes on from."""

    def around_run(self, run: Run) -> Run:
        """With them as LongCat reads them."""

        def changed(request: SampleRequest, host: object) -> tuple[dict[str, object], dict[str, object]]:
            given = request.image.given_latents
            if not given:
                return run(request, host)
            held = GivenLatents.placed(given, noise_shape(request.image, request.model.config))
            if held.frames != tuple(range(len(held.frames))):
                raise ValueError(
                    f"LongCat goes on from latents at the start of a video; these are its frames {held.frames}: give "
                    "them index 0."
                )
            before = torch.cat([part for _, part in held.parts], dim=1)
            return run(
                replace(
                    request,
                    image=replace(request.image, given_latents=()),
                    payloads=(*request.payloads, GivenFrames(frames=before.shape[1])),
                    modifiers=(*request.modifiers, Continuation(before)),
                ),
                host,
            )

        return changed
