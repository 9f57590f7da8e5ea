"""Nodes of FantasyTalking: its module, and speech for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..host import get_host
from ..multitalk.audio import AudioOptions, prepare_sound
from ..multitalk.wav2vec import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, Wav2Vec
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from ..registry import SYSTEMS
from ..wanvideo.advice import warn_of_cut
from .extension import FantasyTalkingEmbeds
from .frame_attention import cut
from .projection import FantasyTalkingModel, load_fantasytalking

log = logging.getLogger("wanvideo")

Audio = dict[str, object]

# Tokens of speech that a latent frame hears on either side of its own.
AROUND = 4
# The authors' videos outlast their sound by as much.
SPARE_FRAMES = 5
PLAIN = AudioOptions(normalize_loudness=False)


class FantasyTalkingModelLoader:
    """Chooses a FantasyTalking module; its projection is loaded, the model loader reads the rest."""

    DISPLAY_NAME = "FantasyTalking Model Loader"
    DESCRIPTION = "Loads a FantasyTalking module: connect it to the model loader and to FantasyTalkingWav2VecEmbeds."
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("FANTASYTALKINGMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        precision = {"default": "fp16", "tooltip": "Of the projection; the rest has the precision of the transformer"}
        return {
            "required": {
                "model": (
                    files("diffusion_models"),
                    {"tooltip": "A FantasyTalking module in models/diffusion_models, for a 14B model"},
                ),
                "base_precision": (["fp32", "bf16", "fp16"], precision),
            }
        }

    def loadmodel(self, model: str, base_precision: str) -> tuple[FantasyTalkingModel]:
        """Load the projection; it is on the compute device only while it runs."""
        host = get_host()
        path = host.find_file("diffusion_models", model)
        return (load_fantasytalking(path, dtype=DTYPES[base_precision], host=host, systems=SYSTEMS),)


class FantasyTalkingWav2VecEmbeds:
    """Encodes speech for FantasyTalking."""

    DISPLAY_NAME = "FantasyTalking Wav2Vec Embeds"
    DESCRIPTION = "Encodes speech for FantasyTalking: connect it to fantasytalking_embeds of the sampler."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("FANTASYTALKING_EMBEDS",)
    RETURN_NAMES = ("fantasytalking_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1}
        guided = "Other than 1: guidance by the speech, one more pass a step, more motion; or a list with one a step"
        return {
            "required": {
                "wav2vec_model": ("WAV2VECMODEL", {"tooltip": "Turns sound into features; wav2vec2-base-960h"}),
                "fantasytalking_model": ("FANTASYTALKINGMODEL", {"tooltip": "Projects them"}),
                "audio": ("AUDIO", {"tooltip": "Speech of one person"}),
                "num_frames": (
                    "INT",
                    {"default": 81, "min": 1, "max": 1000, "step": 1, "tooltip": "Frames of the video, at least 5"},
                ),
                "fps": (
                    "FLOAT",
                    {"default": 23.0, "min": 1.0, "max": 60.0, "step": 0.1, "tooltip": "The model was trained at 23"},
                ),
                "audio_scale": ("FLOAT", {**scale, "tooltip": "Strength of the speech, or a list with one a step"}),
                "audio_cfg_scale": ("FLOAT", {**scale, "tooltip": guided}),
            }
        }

    def process(
        self,
        wav2vec_model: Wav2Vec,
        fantasytalking_model: FantasyTalkingModel,
        fps: float,
        num_frames: int,
        audio_scale: float | Sequence[float],
        audio_cfg_scale: float | Sequence[float],
        audio: Audio | None,
    ) -> tuple[FantasyTalkingEmbeds]:
        """Contexts of speech for every latent frame. Raises ValueError if sound and models do not fit."""
        if audio is None:
            raise ValueError("audio has no sound: choose a file that has some.")
        width = wav2vec_model.model.config.hidden_size
        if width != fantasytalking_model.features:
            raise ValueError(
                f"{fantasytalking_model.path.name} reads {fantasytalking_model.features} features but the speech "
                f"encoder gives {width}: load wav2vec2-base-960h."
            )
        sound = _sound(audio, num_frames, fps)
        try:
            # As many frames as the encoder makes of the sound: none of them is interpolated.
            count = (max(len(sound), RECEPTIVE_FIELD) - RECEPTIVE_FIELD) // HOP + 1
            features = wav2vec_model.encode(_normalized(sound), count)[:, -1]
        finally:
            wav2vec_model.managed.release()
        context, lengths = cut(fantasytalking_model.project(features), num_frames, AROUND)
        return (FantasyTalkingEmbeds(context=context, lengths=lengths, scale=audio_scale, cfg_scale=audio_cfg_scale),)


def _sound(audio: Audio, num_frames: int, fps: float) -> NDArray[np.float64]:
    """The sound of the video, mono at 16 kHz; where it is shorter, it is spread over the video, as the authors do."""
    seconds = num_frames / fps
    warn_of_cut("audio", audio["waveform"].shape[-1] / int(audio["sample_rate"]), seconds)
    sound = prepare_sound(audio, seconds, PLAIN)[: int(seconds * SAMPLE_RATE)]
    heard = len(sound) / SAMPLE_RATE
    if (num_frames - SPARE_FRAMES) / fps > heard:
        log.warning(
            "The sound lasts %.1f s and the video %.1f s, over which it is stretched: give num_frames %d or less for "
            "speech in its own time.", heard, seconds, max(int(heard * fps), SPARE_FRAMES),
        )  # fmt: skip
    return sound


def _normalized(sound: NDArray[np.float64]) -> NDArray[np.float64]:
    """At zero mean and unit variance, as the processor of wav2vec2-base-960h gives it to the encoder."""
    return (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(FantasyTalkingModelLoader, FantasyTalkingWav2VecEmbeds)
