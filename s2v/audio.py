"""Speech as the S2V transformer reads it: one row of encoder features for every frame of the video.

Source: Wan-Video/Wan2.2 (wan/modules/s2v/audio_encoder). The rates are those that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Features a second: as the speech encoder gives them, as they are resampled, and frames of the video.
ENCODER_RATE, FEATURE_RATE, FRAME_RATE = 50, 30, 16


def frame_features(layers: Sequence[Tensor], num_frames: int, window_frames: int) -> Tensor:
    """Hidden states [1, T, C] of each layer of a speech encoder -> [1, layers, C, frames], one column a video frame.

    The frames are those of whole windows, enough for the speech or for num_frames of it; behind its end there are
    zeros. Raises ValueError for speech that is too short for a frame.
    """
    states = torch.cat([layer.detach().float().cpu() for layer in layers]).transpose(1, 2)
    count = int(states.shape[-1] / ENCODER_RATE * FEATURE_RATE)
    if count < 1:
        raise ValueError(
            f"The speech gave {states.shape[-1]} features, which is less than a frame of video: give at least a tenth "
            "of a second of sound."
        )
    speech = F.interpolate(states, size=count, mode="linear", align_corners=True)
    speech = speech[..., : num_frames * FEATURE_RATE // FRAME_RATE]
    windows = int(speech.shape[-1] / (window_frames * (FEATURE_RATE / FRAME_RATE))) + 1
    frames = torch.arange(windows * window_frames, dtype=torch.float64)
    places = (frames * FEATURE_RATE / FRAME_RATE).round().long()
    return F.pad(speech, (0, int(places[-1]) + 1))[..., places][None]
