"""What a HuMo video is conditioned on, from sound and pictures to windows, and how its passes add up.

Source: Phantom-video/HuMo (audio windows, conditions), kijai/ComfyUI-WanVideoWrapper (guidance, whose weights its saved
graphs are tuned to).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload, Row, Step, Window, frames_at
from ..wanvideo.config import WanConfig
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.guidance import at_step, per_step
from .extension import AUDIO, IMAGE, NEEDS, TEXT, HuMoWindow

MASK_CHANNELS = 4
# Feature frames behind a latent frame: its own four, and two on either side.
AUDIO_WINDOW = 8
BEFORE = 5


@dataclass(frozen=True, kw_only=True)
class HuMoConditions(Payload):
    """The whole video's (in a socket WANVIDIMAGE_EMBEDS); `window` makes what the model reads.

    features [pixel frames, 5, channels]: Whisper's, at 25 frames a second. cond, empty [1, 4 + z, F, h, w]: mask and
    latents with and without the reference pictures in their last frames. references: how many. scale: strength of the
    sound; cfg_scale: its guidance, one number or one a step; start, end: the part of the steps (0..1) that it guides.
    in_latents: the model has no condition channels.
    """

    features: Tensor
    cond: Tensor
    empty: Tensor
    references: int
    scale: float = 1.0
    cfg_scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    in_latents: bool = False
    needs: ClassVar[str] = NEEDS
    encoded: ClassVar[bool] = True
    part: ClassVar[type[Payload] | None] = HuMoWindow

    def fitted(self, config: WanConfig) -> Self:
        """A model without condition channels goes without pictures by zeros, not by encoded grey."""
        if config.condition_channels:
            return self
        return replace(self, empty=torch.zeros_like(self.cond), in_latents=True)

    def window(self, window: Window) -> HuMoWindow:
        """The part of these latent frames, references included."""
        places = (torch.tensor(window.latents) - window.leading).clamp(min=0)
        # No sound is behind a reference: a frame number far before the first gives zeros.
        heard = torch.where(places < self.cond.shape[2] - self.references, places, -AUDIO_WINDOW)
        cond = frames_at(places.tolist(), self.cond, "The latents of HuMoEmbeds")
        return HuMoWindow(
            audio=audio_windows(self.features, heard)[None],
            scale=torch.tensor(float(self.scale)),
            cond=cond,
            early=cond,
            empty=self.empty[:, :, places],
            references=self.references,
        )

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Guidance by sound and prompt. Outside its steps the prompt alone guides; sound goes on conditioning.

        With t, i, a for text, image and audio, T for the text scale and A for the audio scale:

            condition channels     ti + A (tia - i*) + (T - 2) (i* - ti), where i* goes without text and audio, and in
                                   the early steps without image (`HuMoWindow.without`)
            pictures in latents    A (tia - ta) + T (ta - null) + null

        An audio scale of 1 leaves `tia` against the same without sound (and image), at the text scale.
        """
        if math.isclose(scale, 1.0):
            return None
        audio, image = at_step(per_step(self.cfg_scale), step), {IMAGE} if self.in_latents else set()
        if not step.within(self.start, self.end):
            return _pair(scale, {TEXT} | image)
        if math.isclose(audio, 1.0):
            return _pair(scale, {AUDIO} | image)
        if self.in_latents:
            return (
                Row(audio),
                Row(scale - audio, frozenset({IMAGE})),
                Row(1.0 - scale, frozenset({TEXT, AUDIO, IMAGE})),
            )
        return (
            Row(audio),
            Row(3.0 - scale, frozenset({AUDIO})),
            Row(scale - 2.0 - audio, frozenset({TEXT, AUDIO})),
        )


def _pair(scale: float, names: set[str]) -> tuple[Row, ...]:
    return Row(scale), Row(1.0 - scale, frozenset(names))


def audio_windows(features: Tensor, latents: Tensor) -> Tensor:
    """Features [frames, 5, channels] behind latent frames [F], as [F, 8, 5, channels].

    Latent frame 0 is one pixel frame, every other one four; each sees two frames more on either side. Before the first
    and after the last there are zeros.
    """
    index = VAE_TIME_STRIDE * latents[:, None] - BEFORE + torch.arange(AUDIO_WINDOW)
    inside = (index >= 0) & (index < len(features))
    windows = features[index.clamp(0, len(features) - 1)]
    return torch.where(inside[..., None, None], windows, torch.zeros_like(windows))


def with_pictures(grey: Tensor, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Conditions with and without pictures, [1, 4 + z, F, h, w], of an encoded grey video [z, F, h, w].

    pictures [z, 1, h, w] each take the place of the last frames, at which the mask is 1 in both.
    """
    video = grey.shape[1] - len(pictures)
    mask = torch.zeros(MASK_CHANNELS, *grey.shape[1:])
    mask[:, video:] = 1
    given = torch.cat((grey[:, :video], *pictures), dim=1)
    return torch.cat((mask, given))[None], torch.cat((mask, grey))[None]
