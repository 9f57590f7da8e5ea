"""The sounds of one to four speakers, as nodes are given them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..wanvideo.advice import warn_of_cut
from ..wanvideo.finite import check_finite
from .audio import AudioOptions, prepare_sound, whole_frames
from .speakers import check_masks, check_painted

log = logging.getLogger("wanvideo")

TRAINED_FPS = 25.0
_STRENGTH = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
# Inputs of the nodes that encode speech, before and behind the number of frames, and those that may stay unconnected.
FIRST_SPEAKER = {
    "audio_1": ("AUDIO", {"tooltip": "Speech of the first speaker"}),
    "normalize_loudness": ("BOOLEAN", {"default": True, "tooltip": "To -23 LUFS"}),
}
HOW_THEY_SPEAK = {
    "fps": (
        "FLOAT",
        {"default": TRAINED_FPS, "min": 1.0, "max": 60.0, "step": 0.1, "tooltip": "Models were trained at 25"},
    ),
    "audio_scale": ("FLOAT", {**_STRENGTH, "tooltip": "Strength of the speech"}),
    "audio_cfg_scale": ("FLOAT", {**_STRENGTH, "tooltip": "Above 1: one more pass a step, more motion"}),
    "multi_audio_type": (["para", "add"], {"default": "para", "tooltip": "At once, or in turn"}),
}
OTHER_SPEAKERS = {
    "audio_2": ("AUDIO", {"tooltip": "Speech of the second speaker"}),
    "audio_3": ("AUDIO", {"tooltip": "Speech of the third speaker"}),
    "audio_4": ("AUDIO", {"tooltip": "Speech of the fourth speaker"}),
    "ref_target_masks": ("MASK", {"tooltip": "Where each speaker is, in the order of the audio"}),
}


def prepared(
    audios: Sequence[dict[str, object] | None],
    masks: Tensor | None,
    options: AudioOptions,
    *,
    num_frames: int,
    fps: float,
    sequential: bool,
) -> list[NDArray[np.float32]]:
    """Mono sounds at 16 kHz of those speakers that have one, each of at most num_frames.

    Raises ValueError without a first one, where sounds and masks do not fit, or a sound holds NaN.
    """
    if fps != TRAINED_FPS:
        log.warning("MultiTalk and InfiniteTalk were trained at 25 fps; at %s their lips may drift.", fps)
    given = {f"audio_{number}": audio for number, audio in enumerate(audios, 1) if audio is not None}
    if "audio_1" not in given:
        raise ValueError("audio_1 has no sound: choose a file that has some.")
    check_masks(masks, list(given))
    check_painted(masks, list(given))
    for name, audio in given.items():
        check_finite(f"The sound of {name} holds", audio["waveform"])
        warn_of_cut(name, _seconds(audio), num_frames / fps)
    sounds = [prepare_sound(audio, num_frames / fps, options) for audio in given.values()]
    return [whole_frames(sound, fps) for sound in sounds] if sequential else sounds


def frames_of(sounds: Sequence[NDArray[np.float32]], num_frames: int, *, sequential: bool) -> int:
    """After how many frames all is cut.

    In turn, each speaker has so many, as in the original: a common limit would leave the later ones mute.
    """
    return num_frames * len(sounds) if sequential else num_frames


def _seconds(audio: dict[str, object]) -> float:
    return audio["waveform"].shape[-1] / int(audio["sample_rate"])
