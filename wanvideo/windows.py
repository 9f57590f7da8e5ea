"""Context windows: a video longer than the model's is denoised as windows that overlap, and blended at every step.

Sources: the schedules of AnimateDiff-Evolved (uniform windows that move with the step), FreeNoise (Qiu et al. 2023).
All lengths here are latent frames; a window is a tuple of latent frame numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .conditioning import Step, Window
from .frames import VAE_TIME_STRIDE, latent_frames, pixel_frames
from .guidance import Conditions, Denoiser
from .modules.model import WanModel
from .step_cache import StepMemories

log = logging.getLogger("wanvideo")

Frames = tuple[int, ...]

SCHEDULES = ("uniform_standard", "uniform_looped", "static_standard")
FUSE_METHODS = ("linear", "pyramid")
# A frame that only one window's end covers must still count.
LEAST_WEIGHT = 1e-4


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """What the node asks for, in pixel frames (socket WANVIDCONTEXT).

    reference [n, C, F, h, w]: encoded pictures that take the place of the first condition frame in windows that do not
    start the video; several are spread over it.
    """

    schedule: str = "uniform_standard"
    size: int = 81
    stride: int = 4
    overlap: int = 16
    freenoise: bool = True
    fuse: str = "linear"
    verbose: bool = False
    reference: Tensor | None = None

    @property
    def latent_size(self) -> int:
        """Latent frames of a window."""
        return latent_frames(self.size)

    @property
    def latent_overlap(self) -> int:
        """Latent frames that windows share."""
        return self.overlap // VAE_TIME_STRIDE

    @property
    def looped(self) -> bool:
        """Whether the video's end goes on at its start."""
        return self.schedule == "uniform_looped"

    def apply_to(self, frames: int) -> bool:
        """Whether a video of so many latent frames is cut into windows. Raises ValueError as `check`."""
        self.check()
        return frames > self.latent_size

    def check(self) -> None:
        """Raises ValueError if windows cannot move on."""
        if self.latent_overlap >= self.latent_size:
            raise ValueError(
                f"context_overlap ({self.overlap}) must be less than context_frames ({self.size}), both counted in "
                "fours."
            )

    def check_reference(self, shape: Sequence[int]) -> None:
        """Raises ValueError where the reference's pictures are not of a video of this shape [C, F, h, w]."""
        given = shape if self.reference is None else self.reference.shape[1:]
        if (given[0], *given[2:]) != (shape[0], *shape[2:]):
            raise ValueError(
                f"reference_latent of WanVideo Context Options has pictures of {tuple(given)} (channels, frames, "
                f"height, width) but the video's latents are {tuple(shape)}: encode them at its width and height."
            )

    def seen(self, frames: int) -> int:
        """Latent frames that one forward sees of a video of so many."""
        return self.latent_size if self.apply_to(frames) else frames

    def windows(self, step: int, frames: int) -> list[Frames]:
        """The windows of a step, counted from 0, that cover `frames` latent frames. Raises ValueError as `apply_to`."""
        if not self.apply_to(frames):
            return [tuple(range(frames))]
        if self.schedule == "static_standard":
            return static_windows(frames, self.latent_size, self.latent_overlap)
        strides = max(self.stride // VAE_TIME_STRIDE, 1)
        ring = looped_windows(step, frames, self.latent_size, self.latent_overlap, strides=strides)
        return ring if self.looped else unrolled(ring, frames, self.latent_size)


def static_windows(frames: int, size: int, overlap: int) -> list[Frames]:
    """The same windows at every step; the last one ends with the video."""
    starts = [*range(0, frames - size, size - overlap), frames - size]
    return [tuple(range(start, start + size)) for start in starts]


def radical_inverse(step: int) -> float:
    """Van der Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    value, share = 0.0, 0.5
    while step:
        value += share * (step & 1)
        step, share = step >> 1, share / 2
    return value


def looped_windows(step: int, frames: int, size: int, overlap: int, *, strides: int) -> list[Frames]:
    """Windows of every 1st, 2nd, 4th, ... frame, `strides` kinds at most, on a video that closes into a ring.

    They move with the step, so that seams fall on other frames each time. Strides at which a window would meet itself
    are left out.
    """
    phase = radical_inverse(step)
    offset = round(frames * phase)
    found = []
    for stride in (2**power for power in range(strides)):
        if (size - 1) * stride >= frames:
            break
        starts = range(offset + int(phase * stride), offset + frames, size * stride - overlap)
        found += [tuple((start + stride * place) % frames for place in range(size)) for start in starts]
    return found


def unrolled(windows: Sequence[Frames], frames: int, size: int) -> list[Frames]:
    """Windows of a ring for a video with two ends: one that runs over the end is moved back to end with the video.

    Where the next window does not begin what was cut off so, a window of its own does.
    """
    flat: list[Frames] = []
    for number, window in enumerate(windows):
        begin = min(window)
        if begin == window[0]:
            flat.append(window)
            continue
        spread = [(frame - window[0]) % frames for frame in window]
        flat.append(tuple(frame + frames - 1 - spread[-1] for frame in spread))
        if begin not in (windows[number + 1] if number + 1 < len(windows) else flat[0]):
            flat.append(tuple(range(begin, begin + size)))
    bare = sorted(set(range(frames)).difference(*flat))
    if bare:
        flat.append(tuple(range(bare[0], bare[0] + size)))
    return list(dict.fromkeys(flat))


def blend_weights(window: Frames, frames: int, options: ContextOptions) -> Tensor:
    """Weight of each of the window's frames where windows overlap: [n]."""
    size, overlap = len(window), options.latent_overlap
    rise, fall = torch.linspace(0, 1, overlap), torch.linspace(1, 0, overlap)
    weights = torch.ones(size)
    first, last = min(window) == 0, max(window) == frames - 1
    if options.fuse == "pyramid":
        place = torch.arange(size)
        weights = torch.minimum(place + 1, size - place) / math.ceil(size / 2)
        if first and not options.looped:
            weights[:overlap] = weights[:overlap].maximum(rise)
        if last and not options.looped:
            weights[size - overlap :] = weights[size - overlap :].maximum(fall)
        return weights.clamp(min=LEAST_WEIGHT)
    if not first or (options.looped and last):
        weights[:overlap] = rise
    if not last or (options.looped and first):
        weights[size - overlap :] = fall
    return weights.clamp(min=LEAST_WEIGHT)


def free_noise(noise: Tensor, options: ContextOptions, generator: torch.Generator) -> Tensor:
    """FreeNoise: from the second window on, noise [C, F, h, w] is the first frames' in another order.

    Raises ValueError as `ContextOptions.check`.
    """
    options.check()
    noise = noise.clone()
    frames, size = noise.shape[1], options.latent_size
    for start in range(0, frames - size, size - options.latent_overlap):
        count = min(size - options.latent_overlap, frames - size - start)
        order = torch.randperm(count, generator=generator) + start
        noise[:, start + size : start + size + count] = noise[:, order]
    return noise


class WindowedDenoiser:
    """Velocity of a long video from windows; stands in for a `Denoiser`.

    conditions: of the whole video. texts: prompts [tokens, text_dim] that windows share out. references: how many
    latent frames at either end every window keeps. make: a Denoiser of one window's conditions, for one forward.
    memories: makes what the step cache remembers of one window. model: what they run.
    """

    def __init__(
        self,
        conditions: Conditions,
        *,
        options: ContextOptions,
        texts: Sequence[Tensor],
        references: tuple[int, int],
        device: torch.device,
        make: Callable[[Conditions, StepMemories | None], Denoiser],
        memories: Callable[[], StepMemories | None],
        model: WanModel,
    ) -> None:
        self.device = device
        self.model = model
        self._conditions, self._options, self._texts = conditions, options, texts
        self._leading, self._trailing = references
        self._make, self._memories = make, memories
        self._remembered: dict[Frames, StepMemories | None] = {}

    def check(self, frames: int) -> None:
        """Raises ValueError where a payload has no part for one of the windows of so many latents, references included.

        Otherwise the first windows would have run when a later one finds that there are too few poses, say.
        """
        count = frames - self._leading - self._trailing
        for window in self._options.windows(0, count):
            self._conditions_of(self._window(window, count), window, count)

    def __call__(self, latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
        """As Denoiser."""
        latents = latents.to(self.device, torch.float32)
        count = latents.shape[1] - self._leading - self._trailing
        total, weight = torch.zeros_like(latents), latents.new_zeros(1, latents.shape[1], 1, 1)
        windows = self._options.windows(step.in_run, count)
        # What is remembered of a window that has moved on can serve no step any more.
        old = self._remembered
        self._remembered = {frames: old[frames] if frames in old else self._memories() for frames in windows}
        for frames in windows:
            if self._options.verbose:
                log.info("Step %d, context window %s.", step.in_run + 1, frames)
            window = self._window(frames, count)
            places = torch.tensor(window.latents, device=self.device)
            times = timestep[places.to(timestep.device)] if timestep.dim() else timestep
            denoiser = self._make(self._conditions_of(window, frames, count), self._remembered[frames])
            velocity = denoiser(latents[:, places], times, step)
            share = self._weights(frames, count).to(self.device)[None, :, None, None]
            total.index_add_(1, places, velocity * share)
            weight.index_add_(1, places, share)
        return total / weight

    def report(self) -> None:
        """As Denoiser."""
        for memories in self._remembered.values():
            if memories is not None:
                memories.report()

    def forget(self) -> None:
        """As Denoiser."""
        self._remembered.clear()

    def _window(self, frames: Frames, count: int) -> Window:
        end = self._leading + count
        reference = self._options.reference
        return Window(
            latents=(
                *range(self._leading), *(self._leading + frame for frame in frames), *range(end, end + self._trailing),
            ),
            pixels=pixel_frames(frames),
            leading=self._leading,
            trailing=self._trailing,
            picture=None if frames[0] == 0 or reference is None else _part(reference, frames, count),
            total=end + self._trailing,
        )  # fmt: skip

    def _conditions_of(self, window: Window, frames: Frames, count: int) -> Conditions:
        parts = (payload.window(window) for payload in self._conditions.payloads)
        return replace(
            self._conditions,
            positive=_part(self._texts, frames, count),
            payloads=tuple(part for part in parts if part is not None),
        )

    def _weights(self, frames: Frames, count: int) -> Tensor:
        """Of the window's latents: references, which every window has, count alike in all of them."""
        weights = blend_weights(frames, count, self._options)
        return torch.cat((torch.ones(self._leading), weights, torch.ones(self._trailing)))


def _part(values: Sequence[Tensor] | Tensor, window: Frames, count: int) -> Tensor:
    """The one of several prompts or pictures, in the order of the video, that the window's last frame belongs to."""
    return values[max(window) * len(values) // count]
