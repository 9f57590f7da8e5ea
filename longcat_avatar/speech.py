"""Speech of one part of a LongCat avatar video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..multitalk.audio import MultiTalkEmbeds
from ..multitalk.extension import AudioWindow
from ..multitalk.multitalk import AUDIO_WINDOW
from ..wanvideo.conditioning import Window

# Speech of avatar 1.0 has two features a frame: a video of 16 frames a second is made with features at 32.
STRIDE = 2
PADDINGS = ("pad_with_start", "mirror_from_end")


@dataclass(frozen=True, kw_only=True)
class WhisperSpeech(MultiTalkEmbeds):
    """Encoded speech as avatar 1.5 hears it, one feature a frame."""


@dataclass(frozen=True, kw_only=True)
class LongCatSpeech(MultiTalkEmbeds):
    """Encoded speech, of which so many frames from the feature `start` on belong to the video that is sampled.

    stride: features a frame.
    """

    start: int
    frames: int
    stride: int = STRIDE

    def window(self, window: Window) -> AudioWindow:
        """The features of each frame, with their two neighbors on both sides; the last is repeated behind the end.

        Raises ValueError for a part of the video.
        """
        if not window.whole:
            raise ValueError(
                "LongCat avatar makes a long video in parts that go on from each other, not in context windows: "
                "disconnect the context options."
            )
        half = AUDIO_WINDOW // 2
        centers = self.start + self.stride * torch.arange(self.frames)
        index = (centers[:, None] + torch.arange(-half, half + 1)).clamp(0, self.num_frames - 1)
        audio = torch.stack([feature[index] for feature in self.features])[None]
        return AudioWindow(audio, torch.tensor(float(self.scale)), self.masks)


def lengthened(features: tuple[Tensor, ...], length: int, padding: str) -> tuple[Tensor, ...]:
    """Features [frames, layers, channels] of at least so many frames: with the first repeated, or the end mirrored."""
    missing = length - features[0].shape[0]
    if missing <= 0:
        return features
    more = [f[:1].expand(missing, -1, -1) if padding == "pad_with_start" else f[-missing:].flip(0) for f in features]
    return tuple(torch.cat(pair) for pair in zip(features, more, strict=True))
