"""Videos that are made window by window, each from the end of the one before: what such loops have in common.

Windows give frames, which go to a footage as they are made, so that a run that cannot go on loses none of them.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .denoise import NotFiniteError
from .footage import Footage
from .request import SampleRequest
from .sampling import RunWatcher, check_conditions, readable_payloads

if TYPE_CHECKING:
    from ..host import Host, Progress
    from .conditioning import Payload, Window
    from .modules.vae import WanVAE

log = logging.getLogger("wanvideo")

# Of noise; a multiple of 16, the numbers that torch draws at once.
PIECE = 2**20
# Parts of a step that the progress bar can show, for a bar that moves while a window is decoded.
TICKS = 20


def windows_generator(request: SampleRequest) -> torch.Generator:
    """The seed's generator for windows that draw their noise from it in turn, as saved graphs have it.

    The first noise, of the size of the embeds, is no window's. It is drawn in pieces: a long video has gigabytes of it.
    """
    generator = torch.Generator().manual_seed(request.seed)
    count = math.prod(request.image.latent_shape)
    for first in range(0, count, PIECE):
        torch.randn(min(PIECE, count - first), generator=generator)
    return generator


def check_windows(request: SampleRequest, *, asked_by: str, remedy: str) -> None:
    """Raises ValueError for what no such loop takes.

    asked_by: the option that asks for windows; remedy: how to do without them.
    """
    check_conditions(request)
    check_whole_schedule(request)
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


def check_whole_schedule(request: SampleRequest) -> None:
    """Raises ValueError where windows, which are decoded one by one, would be decoded with noise in them."""
    schedule = request.schedule
    if schedule.first_index + len(schedule) < schedule.total:
        raise ValueError(
            f"A video that is made in windows needs the last of the {schedule.total} steps, as each window is decoded "
            "before the next begins: set end_step to -1. Two samplers cannot share its steps."
        )


def check_last_window(request: SampleRequest, last: Window, *, apart: type[Payload] | tuple[()] = ()) -> None:
    """Raises ValueError where a system brings less than the last window needs. apart: what the loop windows itself."""
    for payload in readable_payloads(request, request.model.transformer):
        if not isinstance(payload, apart):
            payload.window(last)


def check_decoded(frames: Tensor, first: int) -> None:
    """Raises NotFiniteError for frames that hold NaN or infinity, which 8 bits would hide. first: their number."""
    if not bool(torch.isfinite(frames).all()):
        raise NotFiniteError(
            f"The VAE decoded NaN or infinite values at frame {first}: choose precision bf16 or fp32 in "
            "WanVideoVAELoader."
        )


class Relay(Protocol):
    """What goes from one window to the next, in a form that another process can go on from."""

    def hand_over(self, index: int) -> Mapping[str, Tensor]:
        """Prepare the window after this one; returns all that it depends on."""

    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `hand_over` returned in another process."""


def make_windows(
    request: SampleRequest,
    host: Host,
    frames: Callable[[int, LoopWatcher], Iterable[Tensor]],
    *,
    spans: Sequence[range],
    size: Sequence[int],
    vae: WanVAE,
    footage: Footage,
    relay: Relay | None = None,
) -> Tensor:
    """Make the windows that the footage does not have yet; returns its video. Frees the GPU in the end.

    frames: new frames [n, H, W, 3] in 0..1 of a window by its number, some at a time. spans: the frames that windows
    sample. size: of the latents of a forward (frames, height, width). relay: for a footage that runs go on from. Raises
    ValueError for the VAE of another model.
    """
    if vae.latent_channels != request.model.config.out_dim:
        raise ValueError(
            f"The VAE makes latents of {vae.latent_channels} channels but the model predicts "
            f"{request.model.config.out_dim}: connect the Wan 2.2 VAE for the 5B model, the Wan 2.1 VAE for the others."
        )
    steps = len(request.schedule)
    request.model.try_attention(size, request.guidance.most_passes(steps))
    footage = request.model.transformer.ranks.writer(footage)
    try:
        done, handover = footage.open()
        if handover is not None:
            relay.take_over(handover)
        with host.progress(len(spans) * (steps + 1) * TICKS, "Sampling") as progress:
            watcher = LoopWatcher(host, progress, request.set_step, done=done * steps, spans=spans, steps=steps)
            for index in range(done, len(spans)):
                watcher.start(index)
                with _kept(footage, host, watcher.place):
                    for images in frames(index, watcher):
                        footage.add(images)
                        watcher.decoded(len(images))
                    watcher.finish_window()
                    if relay is not None and index + 1 < len(spans):
                        footage.finish_window(index + 1, relay.hand_over(index))
                log.info("Window %d of %d is finished; %s", index + 1, len(spans), watcher.time_left())
        footage.finish()
        return footage.video()
    finally:
        footage.close()
        vae.managed.release()
        if request.force_offload:
            request.model.managed.release()


@contextmanager
def _kept(footage: Footage, host: Host, place: str) -> Iterator[None]:
    """Keeps the frames of a run that does not go on, whatever the reason, and says where they are."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, (NotFiniteError, torch.OutOfMemoryError))
        where = _rescued(footage, host)
        if expected:
            # What is known of an error is in its type: ComfyUI frees its models where memory was short.
            raise type(error)(f"{place}: {error} ({where})") from error
        if footage.frames:
            # Cancellation has no text of its own that a user would see.
            log.warning("%s was broken off. %s", place, where)
        raise


def _rescued(footage: Footage, host: Host) -> str:
    if not footage.frames:
        return "There are no frames before it."
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    try:
        folder = footage.rescue(host.output_dir() / f"{stamp}_unfinished")
    except OSError as lost:
        # What went wrong first must not be hidden by what went wrong in saving.
        return f"The {footage.frames} frames before could not be saved: {lost}"
    return f"The {footage.frames} frames before are in {folder}."


class LoopWatcher(RunWatcher):
    """One progress bar over all windows: what is sampled, which window and step, and the time left.

    A step takes TICKS of the bar, and so does decoding a window.
    """

    def __init__(
        self,
        host: Host,
        progress: Progress,
        set_step: Callable[[int], None],
        *,
        done: int,
        spans: Sequence[range],
        steps: int,
    ) -> None:
        super().__init__(host, progress, set_step, done)
        self._spans = spans
        self._steps = steps
        self._index = 0
        self._frames = 0
        self._first = self.done
        self._began = time.monotonic()

    @property
    def _span(self) -> range:
        return self._spans[self._index]

    @property
    def place(self) -> str:
        """The window, for a sentence."""
        return f"Window {self._index + 1} of {len(self._spans)} (frames {self._span.start}-{self._span.stop - 1})"

    def start(self, index: int) -> None:
        """The window that the next steps belong to."""
        self._index = index
        self._frames = 0
        self._tell("step 0 of {}")

    def begin(self, index: int) -> None:
        """Names the step before it runs."""
        super().begin(index)
        self._tell(f"step {index + 1} of {{}}")

    def end(self, index: int, clean: Tensor) -> None:
        """One step further, with the estimate as preview."""
        self.done += 1
        self.progress.update(self._ticks(), note=self.note, preview=clean)

    def decoded(self, frames: int) -> None:
        """So many frames more of the window have been decoded."""
        self._frames += frames
        self._tell(f"{self._frames} frames decoded")

    def finish_window(self) -> None:
        """All its frames are there."""
        self._frames = len(self._span)
        if self._index == len(self._spans) - 1:
            taken = datetime.timedelta(seconds=round(time.monotonic() - self._began))
            self.note = f"Finished: {len(self._spans)} windows, {taken}"
        self.progress.update(self._ticks(), note=self.note)

    def _ticks(self) -> int:
        """Of the bar, with what is decoded of the window."""
        return (self.done + self._index) * TICKS + self._frames * TICKS // len(self._span)

    def _tell(self, what: str) -> None:
        self.note = (
            f"Sampling frames {self._span.start}-{self._span.stop}, window {self._index + 1} of "
            f"{len(self._spans)}, {what.format(self._steps)}, {self.time_left()}"
        )
        self.progress.update(self._ticks(), note=self.note)

    def time_left(self) -> str:
        """From the mean time of the steps so far, decoding included."""
        steps = self.done - self._first
        if not steps:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / steps * (len(self._spans) * self._steps - self.done)
        return f"{datetime.timedelta(seconds=round(seconds))} left"
