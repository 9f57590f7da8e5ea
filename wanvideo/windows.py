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

from .extension import Step
from .guidance import Conditions, Denoiser, KeptConditioning
from .modules.model import WanModel
from .payloads import VAE_TIME_STRIDE, latent_frames
from .step_cache import StepMemories

log = logging.getLogger("wanvideo")

Frames = tuple[int, ...]

SCHEDULES = ("uniform_standard", "uniform_looped", "static_standard")
FUSE_METHODS = ("linear", "pyramid")
MASK_CHANNELS = 4
# A frame that only one window's end covers must still count.
LEAST_WEIGHT = 1e-4
# Share of the GPU's memory that stays free of what windows keep: forwards to come may need more than those so far.
SPARE = 1 / 8
# Bytes that are no growth of what a window keeps.
LITTLE = 2**20


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
        """Whether a video of so many latent frames is cut into windows. Raises ValueError if windows cannot move on."""
        if self.latent_overlap >= self.latent_size:
            raise ValueError(
                f"context_overlap ({self.overlap}) must be less than context_frames ({self.size}), both counted in "
                "fours."
            )
        return frames > self.latent_size

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
    for power in range(min(strides, math.ceil(math.log2(frames / size)) + 1)):
        stride = 2**power
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
        over = next((place for place in range(1, size) if window[place] < window[place - 1]), None)
        if over is None:
            flat.append(window)
            continue
        spread = [(frame - window[0]) % frames for frame in window]
        flat.append(tuple(frame + frames - 1 - spread[-1] for frame in spread))
        begin = window[over]
        if begin not in (windows[number + 1] if number + 1 < len(windows) else flat[0]):
            flat.append(tuple(range(begin, begin + size)))
    bare = sorted(set(range(frames)).difference(*flat))
    if bare:
        start = min(bare[0], frames - size)
        flat.append(tuple(range(start, start + size)))
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
    """FreeNoise: from the second window on, noise [C, F, h, w] is the first frames' in another order."""
    noise = noise.clone()
    frames, size = noise.shape[1], options.latent_size
    for start in range(0, frames - size, size - options.latent_overlap):
        count = min(size - options.latent_overlap, frames - size - start)
        order = torch.randperm(count, generator=generator) + start
        noise[:, start + size : start + size + count] = noise[:, order]
    return noise


def pixel_frames(window: Frames) -> list[int]:
    """The pixel frames behind a window: one for its first latent frame, four for every other."""
    later = [VAE_TIME_STRIDE * frame - back for frame in window[1:] for back in range(VAE_TIME_STRIDE - 1, -1, -1)]
    return [VAE_TIME_STRIDE * window[0], *(max(frame, 0) for frame in later)]


def has_room(device: torch.device, size: int) -> bool:
    """Whether a window may keep `size` bytes on `device` after its forward, where the next window will want as many.

    What PyTorch holds in reserve does not count as free: the next forward needs it.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    free, total = torch.cuda.mem_get_info(device)
    return free > SPARE * total + size


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class WindowedDenoiser:
    """Velocity of a long video from windows; stands in for a `Denoiser`.

    conditions: of the whole video; what all windows share is a KeptConditioning. texts: prompts [tokens, text_dim] that
    share it out. make: a Denoiser of one window's conditions. It is kept, with all that it keeps, if the next step has
    the same window and there is room; or else it lives for one forward. memories: makes what the step cache remembers
    of one window. model: what they run.
    """

    def __init__(
        self,
        conditions: Conditions,
        *,
        options: ContextOptions,
        texts: Sequence[Tensor],
        device: torch.device,
        make: Callable[[Conditions, StepMemories | None], Denoiser],
        memories: Callable[[], StepMemories | None],
        model: WanModel,
    ) -> None:
        self.device = device
        self.model = model
        self._conditions, self._options, self._texts = conditions, options, texts
        self._make, self._memories = make, memories
        self._remembered: dict[Frames, StepMemories | None] = {}
        self._denoisers: dict[Frames, Denoiser] = {}

    def __call__(self, latents: Tensor, timestep: Tensor, step: Step, index: int) -> Tensor:
        """As Denoiser."""
        latents = latents.to(self.device, torch.float32)
        count = latents.shape[1]
        total, weight = torch.zeros_like(latents), latents.new_zeros(1, count, 1, 1)
        windows = self._options.windows(index, count)
        again = self._options.windows(index + 1, count) if step.index + 1 < step.total else ()
        # What is remembered of a window that has moved on can serve no step any more.
        old = self._remembered
        self._remembered = {window: old[window] if window in old else self._memories() for window in windows}
        for window in windows:
            if self._options.verbose:
                log.info("Step %d, context window %s.", index + 1, window)
            places = torch.tensor(window, device=self.device)
            times = timestep[places.to(timestep.device)] if timestep.dim() else timestep
            kept, before = self._denoisers.pop(window, None), _allocated(self.device)
            denoiser = kept or self._make(self._of(window, count), self._remembered[window])
            velocity = denoiser(latents[:, places], times, step, index)
            more = _allocated(self.device) - before - velocity.nbytes
            # The first to come stay: if windows took turns, each would be gone before its next step. But what a window
            # keeps grows with the first pass without speech, say.
            if window in again and ((kept and more < LITTLE) or has_room(self.device, more)):
                self._denoisers[window] = denoiser
            share = blend_weights(window, count, self._options).to(self.device)[None, :, None, None]
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
        shared = tuple(c for c in self._conditions.conditionings if isinstance(c, KeptConditioning))
        self._make(replace(self._conditions, channels=None, conditionings=shared), None).forget()
        self._remembered.clear()
        self._denoisers.clear()

    def _of(self, window: Frames, count: int) -> Conditions:
        """The window's part of the conditions."""
        pixels = pixel_frames(window)
        return replace(
            self._conditions,
            positive=_part(self._texts, window, count),
            channels=self._channels(window, count),
            conditionings=tuple(
                c if isinstance(c, KeptConditioning) else c.window(pixels) for c in self._conditions.conditionings
            ),
        )

    def _channels(self, window: Frames, count: int) -> Tensor | None:
        channels, reference = self._conditions.channels, self._options.reference
        if channels is None:
            return None
        part = channels[:, list(window)].clone()
        part[:, 0] = channels[:, 0]
        if window[0] != 0 and reference is not None:
            part[MASK_CHANNELS:, 0] = _part(reference, window, count)[:, 0].to(part)
        return part


def _part(values: Sequence[Tensor] | Tensor, window: Frames, count: int) -> Tensor:
    """The one of several prompts or pictures, in the order of the video, that the window's last frame belongs to."""
    return values[min(int(max(window) / (count / len(values))), len(values) - 1)]
