"""One window of a long talking video: conditions in, frames out, and what it hands to the next window.

The Wan VAE is causal: the latents of the first frames do not depend on those after them. So where a window's condition
begins with its motion frames (MultiTalk, every first window), their latents are the condition's first ones, exactly,
and are not encoded again. InfiniteTalk's later windows have the picture in the condition and need their motion frames
encoded; these are never the latents that were sampled, whose first frame stands for one pixel frame and others for
four.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..image_to_video.extension import ImageCondition
from ..wanvideo import conditioning
from ..wanvideo.denoise import LatentHook, NotFiniteError, denoise
from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.guidance import Conditions
from ..wanvideo.images import to_images
from ..wanvideo.latents import Inpainting, add_noise, change_mask, start_noise
from ..wanvideo.modules.vae import Tile
from ..wanvideo.request import SampleRequest
from ..wanvideo.sampling import RunWatcher, active_model, make_denoiser, readable_payloads
from ..wanvideo.window_loop import check_decoded, check_last_window, windows_generator
from .audio import MultiTalkEmbeds
from .colormatch import match_colors
from .motion import KeptMotion, NoisedMotion
from .pictures import Pictures, SourceFrames, StartPictures, grey, keyframe
from .plan import KEYFRAME_REPEATS, Window
from .settings import LoopSettings

if TYPE_CHECKING:
    from ..host import Host
    from ..wanvideo.conditioning import Payload
    from ..wanvideo.schedulers import Schedule

# In 0..1: a frame with nothing above the first, under a picture whose mean is above the second, is a broken one.
BLACK, LIT = 4 / 255, 16 / 255


class Condition(NamedTuple):
    """Encoded frames [z, F, h, w] of given ones and grey, and their mask [4, F, h, w]."""

    cond: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Handover:
    """What a window gives to the next: latents of its last frames, and the next condition where it begins with them."""

    motion: Tensor
    condition: Condition | None


class WindowMaker:
    """Makes the windows of one run in turn; holds what one window hands to the next."""

    def __init__(self, request: SampleRequest, host: Host, windows: list[Window]) -> None:
        self.request = request
        self.loop: LoopSettings = request.image.loop
        self.host = host
        self.windows = windows
        self.generator = windows_generator(request)
        self.tile = Tile() if self.loop.tiled_vae else None
        self.latents: Tensor = torch.empty(0)
        self.reads_pictures = bool(request.model.config.condition_channels) or self.loop.start_images is not None
        self._pictures = self._source_of_pictures()
        self._tail: Tensor | None = None
        self._handover: Handover | None = None
        self._conditions_of: dict[int, Condition] = {}

    @property
    def _infinite(self) -> bool:
        return self.loop.mode == "infinitetalk"

    def _source_of_pictures(self) -> Pictures | None:
        if not self.reads_pictures:
            return None
        if self.loop.start_images is not None:
            return StartPictures(self.loop.start_images, self._infinite)
        return SourceFrames(self.request.samples["samples"][0].float(), self.loop, self._infinite)

    def frames(self, index: int, watcher: RunWatcher) -> Iterator[Tensor]:
        """The new frames of window `index`, [n, H, W, 3] in 0..1, a few at a time.

        Raises NotFiniteError for frames that are NaN, or black where the picture is not.
        """
        window = self.windows[index]
        self.latents = self._sample(window, watcher)
        picture = None if self._pictures is None else to_images(self._pictures.at(self._pictures.index(window)))[0]
        repeated = 0 if window.index == 0 else self.loop.motion_frames
        tail: list[Tensor] = []
        done = 0
        ranks = self.request.model.transformer.ranks
        for chunk in self.loop.vae.decode_chunks(self.latents, tile=self.tile, quiet=True, ranks=ranks):
            images = self._finished(chunk, picture, window.frames.start + done)
            numbers = torch.arange(done, done + len(images))
            done += len(images)
            tail.append(images[(numbers >= window.kept - self.loop.motion_frames) & (numbers < window.kept)])
            new = images[(numbers >= repeated) & (numbers < window.kept)]
            if len(new):
                yield new
        self._tail = torch.cat(tail).movedim(-1, 0) * 2 - 1

    def _finished(self, chunk: Tensor, picture: Tensor | None, first: int) -> Tensor:
        """Decoded frames [3, n, H, W] as checked images in 0..1 in the colours of the picture; first: their number."""
        check_decoded(chunk, first)
        images = to_images(chunk)
        if picture is None:
            return images
        dark = images.amax(dim=(1, 2, 3)) < BLACK
        if bool(dark.any()) and float(picture.mean()) > LIT:
            raise NotFiniteError(
                f"The video is black from frame {first + int(dark.nonzero()[0])} on although the picture is not: "
                "choose another attention_mode, quantization or base_precision in WanVideoModelLoader."
            )
        return match_colors(images, picture, self.loop.colormatch)

    def hand_over(self, index: int) -> dict[str, Tensor]:
        """Encode what the next window needs, and all that it depends on as tensors (see `take_over`)."""
        following = self.windows[index + 1]
        tail, self._tail = self._tail, None
        if self._pictures is None or self._infinite:
            self._handover = Handover(self._encode(tail), None)
        else:
            condition = self._condition(tail, following)
            self._handover = Handover(condition.cond[:, : latent_frames(tail.shape[1])].clone(), condition)
        tensors = {"motion": self._handover.motion, "generator": self.generator.get_state()}
        if self._handover.condition is not None:
            tensors |= self._handover.condition._asdict()
        return tensors

    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `hand_over` returned in another process."""
        condition = Condition(tensors["cond"], tensors["mask"]) if "cond" in tensors else None
        self._handover = Handover(tensors["motion"], condition)
        self.generator.set_state(tensors["generator"])

    def _encode(self, video: Tensor) -> Tensor:
        ranks = self.request.model.transformer.ranks
        return self.loop.vae.encode(video, tile=self.tile, quiet=True, ranks=ranks)

    def _sample(self, window: Window, watcher: RunWatcher) -> Tensor:
        """The window's latents [z, F, h, w]."""
        request, loop = self.request, self.loop
        schedule = request.schedule.fresh()
        latents, inpainting = self._start(window, schedule)
        condition, hooks = self._given(window, schedule)
        if condition is not None:
            picture = ImageCondition(condition.cond[None], condition.mask[None])
            request = replace(request, payloads=(*request.payloads, picture))
        passes = request.guidance.most_passes(len(schedule))
        with active_model(request, latents.shape[1:], passes) as transformer:
            conditions = self._conditions(window, readable_payloads(request, transformer))
            result = denoise(
                make_denoiser(request, transformer, conditions=conditions),
                schedule,
                latents=latents,
                generator=self.generator,
                # Motion frames last: they hold also where a mask keeps the source video.
                hooks=(*inpainting, *hooks),
                modifiers=request.modifiers,
                watcher=watcher,
            )
        if loop.offload_between_windows:
            request.model.managed.release()
        return result.latents.float().cpu()

    def _given(self, window: Window, schedule: Schedule) -> tuple[Condition | None, tuple[LatentHook, ...]]:
        """The condition, and the hook that holds the motion frames."""
        handover = self._handover
        condition = None if handover is None else handover.condition
        if condition is None and self._pictures is not None:
            condition = self._condition_of(self._pictures.index(window), window)
        if not self._infinite:
            return condition, () if handover is None else (NoisedMotion(handover.motion, schedule, self.generator),)
        if handover is not None:
            return condition, (KeptMotion(handover.motion),)
        return condition, () if condition is None else (KeptMotion(condition.cond[:, :1]),)

    def _condition_of(self, index: int, window: Window) -> Condition:
        """The condition of a picture, which windows share; only the latest is kept."""
        if index not in self._conditions_of:
            self._conditions_of = {index: self._condition(self._pictures.at(index), window)}
        return self._conditions_of[index]

    def _condition(self, given: Tensor, window: Window) -> Condition:
        """The condition that begins with the given frames [3, n, H, W], and ends with the window's keyframe if any."""
        size = self.loop.window_frames
        end = keyframe(self.loop, window, self.request.find(MultiTalkEmbeds).num_frames)
        repeats = 0 if end is None else KEYFRAME_REPEATS
        parts = [given, grey(given, size - given.shape[1] - repeats)]
        if end is not None:
            parts.append(end.expand(-1, repeats, -1, -1))
        cond = self._encode(torch.cat(parts, dim=1))
        mask = torch.zeros(VAE_TIME_STRIDE, *cond.shape[1:])
        mask[:, : latent_frames(given.shape[1])] = 1
        if end is not None:
            # The repeats are the last latent frame's four frames, and one before.
            mask[:, -1] = 1
            mask[-1, -2] = 1
        return Condition(cond, mask)

    def _start(self, window: Window, schedule: Schedule) -> tuple[Tensor, tuple[LatentHook, ...]]:
        """Latents that the window begins with, and the hook that keeps the source video outside a noise mask."""
        vae, loop = self.loop.vae, self.loop
        sides = loop.height // vae.spatial_factor, loop.width // vae.spatial_factor
        noise = start_noise((vae.latent_channels, latent_frames(loop.window_frames), *sides), self.generator)
        source = self.request.samples or {}
        samples = source.get("samples")
        if samples is None:
            return schedule.from_noise(noise), ()
        clean = _frames_of(samples, window, noise.shape)
        latents = add_noise(clean, noise, schedule.level(0)) if self.request.noises_samples else clean
        if source.get("noise_mask") is None:
            return latents, ()
        if source.get("original_image") is not None:
            clean = _frames_of(source["original_image"], window, noise.shape)
        change = change_mask(_masks_of(source["noise_mask"], window.frames), noise.shape)
        return latents, (Inpainting(clean, noise, change, schedule),)

    def check(self) -> None:
        """Raises ValueError where a system brings less than the video needs, before the last window does."""
        check_last_window(self.request, self._seen(self.windows[-1]), apart=ImageCondition)

    def _seen(self, window: Window) -> conditioning.Window:
        """As payloads see it."""
        end = latent_frames(self.request.find(MultiTalkEmbeds).num_frames)
        return conditioning.Window(latents=window.latents, pixels=tuple(window.frames), end=end)

    def _conditions(self, window: Window, payloads: Sequence[Payload]) -> Conditions:
        text = self.request.text
        parts = (p if isinstance(p, ImageCondition) else p.window(self._seen(window)) for p in payloads)
        return Conditions(
            positive=text.positive[min(window.index, len(text.positive) - 1)],
            negative=text.negative[0] if text.negative else None,
            payloads=tuple(part for part in parts if part is not None),
        )


def _frames_of(samples: Tensor, window: Window, shape: torch.Size) -> Tensor:
    """The window's part of a source video's latents; its last frame stays."""
    given = (samples[0] if samples.dim() == 5 else samples).float()
    if (given.shape[0], *given.shape[2:]) != (shape[0], *shape[2:]):
        raise ValueError(
            f"The samples are {tuple(samples.shape)} but a window's latents are {(1, *shape)}: encode the "
            "source video at the width and height of WanVideoImageToVideoMultiTalk."
        )
    first = window.frames.start // VAE_TIME_STRIDE
    return given[:, torch.arange(first, first + shape[1]).clamp(max=given.shape[1] - 1)]


def _masks_of(masks: Tensor, frames: range) -> Tensor:
    """A noise mask's frames [n, H, W] for a window; a mask shorter than the video starts over."""
    flat = masks.reshape(-1, *masks.shape[-2:])
    return flat[torch.arange(frames.start, frames.stop) % flat.shape[0]]
