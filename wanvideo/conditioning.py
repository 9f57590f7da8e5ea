"""What conditions one forward pass, seen from the sampler: its place in schedule and video, the payloads it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .config import WanConfig
from .frames import VAE_TIME_STRIDE

EVERYTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in the schedule a forward pass is. Eager code reads it: none of it may reach a traced hook.

    index counts from 0 within the whole schedule of `total` steps; in_run within this sampler's part of it.
    """

    index: int = 0
    total: int = 1
    in_run: int = 0

    @property
    def percent(self) -> float:
        """Progress from 0 (first step) to 1 (last step)."""
        return self.index / max(self.total - 1, 1)

    def within(self, start: float, end: float) -> bool:
        """Whether the step lies in this part (0..1) of the schedule, as the widgets of nodes count: step / steps."""
        return start <= self.index / self.total <= end


class Row(NamedTuple):
    """One forward pass of a step: its weight in the guided velocity, and the names of what it goes without.

    "text" is the prompt; systems add names of their own ("audio", "image").
    """

    weight: float
    without: frozenset[str] = EVERYTHING


class Window(NamedTuple):
    """A part of the video that one forward sees.

    latents: places along the frame axis of the run's latents. pixels: pixel frames behind the video's latents, one for
    the first latent frame and four for every other. leading, trailing: how many of `latents`, at the ends, are
    references, which stand for no pixel frame. whole: this is all of the video. picture [C, F, h, w]: an encoded
    picture whose first frame takes the place of the first condition frame, for windows that do not start the video.
    total: how many latents the run has, references included; None where it is not known. end: how many the video has,
    without references, where windows of a loop may reach behind it; None where none does.
    """

    latents: tuple[int, ...]
    pixels: tuple[int, ...]
    leading: int = 0
    trailing: int = 0
    whole: bool = False
    picture: Tensor | None = None
    total: int | None = None
    end: int | None = None

    @property
    def video(self) -> tuple[int, ...]:
        """Places of its latents in the video itself: references, which are no part of it, are left out."""
        return tuple(place - self.leading for place in self.latents[self.leading : len(self.latents) - self.trailing])

    @property
    def video_total(self) -> int | None:
        """Latent frames of the whole video without references, where it is known."""
        return None if self.total is None else self.total - self.leading - self.trailing

    def latents_in(self, count: int) -> list[int]:
        """Where its latents are among `count` that a system brings for the run: behind the video's end the last one."""
        return self._held(self.latents, count, 0 if self.end is None else self.leading + self.end)

    def video_in(self, count: int) -> list[int]:
        """The same for `video`, without references."""
        return self._held(self.video, count, self.end or 0)

    def pixels_in(self, count: int) -> list[int]:
        """The same for `pixels`."""
        return self._held(self.pixels, count, VAE_TIME_STRIDE * ((self.end or 0) - 1) + 1)

    def _held(self, places: tuple[int, ...], count: int, end: int) -> list[int]:
        """What is shorter than the video is not made longer: its system tells the user."""
        return list(places) if self.end is None else [min(place, max(count, end) - 1) for place in places]

    @property
    def sounding(self) -> tuple[int, ...]:
        """Pixel frames for all latents but trailing references: each leading one stands for the first frame, still."""
        return (*(self.pixels[0],) * VAE_TIME_STRIDE * self.leading, *self.pixels)


def frames_at(places: Sequence[int], frames: Tensor, what: str) -> Tensor:
    """Those of frames [B, C, F, ...], which a system brings for the whole video, that are at these places.

    Raises ValueError if there are fewer. what: their name in the message, in the plural.
    """
    count, needed = frames.shape[2], max(places, default=-1) + 1
    if needed > count:
        raise ValueError(
            f"{what} have {count} frames but the video needs {needed} or more: give both the same number of frames."
        )
    return frames[:, :, list(places)]


def check_size(what: str, latents: Tensor, video: Tensor, advice: str) -> None:
    """Raises ValueError for latents [B, C, F, H, W] of another length or size than the video's.

    what: their name in the message, in the plural; advice: what to do.
    """
    if latents.shape[2:] != video.shape[2:]:
        raise ValueError(
            f"{what} are {tuple(latents.shape[2:])} (frames, height, width) but the video's "
            f"{tuple(video.shape[2:])}: {advice}."
        )


@dataclass(frozen=True)
class Payload:
    """What a node emits for one system; all that sampler and windows know of it. Subclasses are frozen dataclasses.

    Its Tensor fields lead with a batch axis, or are 0-d. needs: one sentence for users whose model lacks the weights:
    which key is missing, which loader input gives it. optional: such a model ignores the payload, with that sentence as
    a warning. encoded: it holds latents of a VAE at the size of the embeds, which therefore keep their channels; its
    system compares them with the model's. fills_channels: its system gives the model all condition channels that it
    reads, so that no picture need be connected. holds_given: latents that were given before sampling are put back after
    every step. together: a pass leaves more than its velocity, so that all processes must run it. part: what `window`
    returns, where that is another type, which the model reads.
    """

    needs: ClassVar[str]
    optional: ClassVar[bool] = False
    encoded: ClassVar[bool] = False
    fills_channels: ClassVar[bool] = False
    holds_given: ClassVar[bool] = False
    together: ClassVar[bool] = False
    part: ClassVar[type[Payload] | None] = None

    def fitted(self, config: WanConfig) -> Self:
        """The form for a model of these sizes, which guides and conditions the run in the place of this one."""
        return self

    def joined(self, payloads: tuple[Payload, ...]) -> tuple[Payload, ...]:
        """All payloads of the run, this one among them, with what it makes of others; ValueError where one lacks."""
        return payloads

    def window(self, window: Window) -> Self | None:
        """The part that belongs to this window: itself where it is the same for all, None where it has no part."""
        return self

    def without(self, names: frozenset[str]) -> Self | None:
        """What a pass without `names` reads instead: itself, another form, or None for nothing."""
        return self

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """The passes of this step under the text scale `scale`; None leaves them to others."""
        return None

    def fills(self, step: Step) -> bool:
        """Whether its condition channels hold anything in this step: control LoRAs, which read them, wait for it."""
        return True

    def active(self, *, swapped: bool) -> AbstractContextManager[object]:
        """Entered for as long as the model is on the device: holds modules of the payload's own there.

        swapped: whether blocks of the model wait in main memory.
        """
        return _nothing_to_hold()

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """A copy whose tensors are on `device`, floating-point ones in `dtype`; 0-d ones keep theirs."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device, dtype) for f in fields(self)})

    def stack(self, others: Sequence[Self]) -> Self:
        """One payload for a batch: self's batch rows, then each of the others'. Whatever is no tensor must be equal.

        A payload that all passes share stays as it is: one row serves the whole batch.
        """
        if all(other is self for other in others):
            return self
        columns = {f.name: [getattr(p, f.name) for p in (self, *others)] for f in fields(self)}
        return replace(self, **{name: _stacked(name, column) for name, column in columns.items()})


@contextmanager
def _nothing_to_hold() -> Iterator[None]:
    yield


def _moved(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if isinstance(value, tuple):
        return tuple(_moved(part, device, dtype) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() and value.dim() else value.dtype)


def _stacked(name: str, column: Sequence[object]) -> object:
    first = column[0]
    if all(isinstance(value, Tensor) and value.dim() for value in column):
        return torch.cat(column)
    if not all(_same(value, first) for value in column):
        raise ValueError(f"The passes of a batch differ in '{name}': turn batched_cfg off.")
    return first


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
