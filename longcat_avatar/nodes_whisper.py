"""The node that hears for LongCat-Video-Avatar 1.5, with the encoder of Whisper large-v3.

Source: meituan-longcat/LongCat-Video (avatar 1.5: five levels of Whisper's layers, a feature a frame).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..humo.whisper import Whisper
from ..multitalk.audio import AudioOptions, encode_each, mix
from ..multitalk.sounds import FIRST_SPEAKER, HOW_THEY_SPEAK, OTHER_SPEAKERS, frames_of, prepared
from ..node_tools import CATEGORY, Inputs
from .speech import WhisperSpeech

Audio = dict[str, object]


class LongCatAvatarWhisperEmbeds:
    """Encodes the speech of one to four people for LongCat avatar 1.5."""

    DISPLAY_NAME = "LongCat Avatar Whisper Embeds (v1.5)"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("MULTITALK_EMBEDS", "AUDIO", "INT")
    RETURN_NAMES = ("multitalk_embeds", "audio", "num_frames")
    DESCRIPTION = "LongCat avatar 1.5: encodes the speech of one to four people with the encoder of Whisper large-v3."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "whisper_model": ("WHISPERMODEL", {"tooltip": "Turns the sound into features; large-v3"}),
                **FIRST_SPEAKER,
                "num_frames": (
                    "INT",
                    {"default": 93, "min": 1, "max": 10000, "step": 1, "tooltip": "Frames of the whole video"},
                ),
                **HOW_THEY_SPEAK,
            },
            "optional": dict(OTHER_SPEAKERS),
        }

    def process(
        self,
        whisper_model: Whisper,
        audio_1: Audio,
        normalize_loudness: bool,
        num_frames: int,
        fps: float,
        audio_scale: float,
        audio_cfg_scale: float | Sequence[float],
        multi_audio_type: str,
        audio_2: Audio | None = None,
        audio_3: Audio | None = None,
        audio_4: Audio | None = None,
        ref_target_masks: Tensor | None = None,
    ) -> tuple[WhisperSpeech, Audio, int]:
        """Speech features [frames, 5, 1280] of each, the mixed sound, and num_frames as it is.

        Raises ValueError where sounds and masks do not fit, or a sound holds NaN.
        """
        sequential = multi_audio_type == "add"
        sounds = prepared(
            (audio_1, audio_2, audio_3, audio_4), ref_target_masks,
            AudioOptions(normalize_loudness=normalize_loudness), num_frames=num_frames, fps=fps, sequential=sequential,
        )  # fmt: skip
        longest = frames_of(sounds, num_frames, sequential=sequential)
        try:
            features = encode_each(
                lambda sound, frames: whisper_model.encode(sound, fps),
                sounds, fps=fps, sequential=sequential, longest=longest,
            )  # fmt: skip
        finally:
            whisper_model.managed.release()
        embeds = WhisperSpeech(
            features=features, scale=audio_scale, cfg_scale=audio_cfg_scale, masks=ref_target_masks
        )
        return embeds, mix(sounds, sequential=sequential, seconds=longest / fps), num_frames
