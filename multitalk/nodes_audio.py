"""Nodes from sound to the speech that MultiTalk and InfiniteTalk listen to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..host import get_host
from ..linked_values import add_form
from ..node_checks import Types, check_loadable, need_link, verdict
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from .audio import IN_DICT, AudioOptions, MultiTalkEmbeds, encode_silence, encode_speech, mix, silent_speech
from .sounds import FIRST_SPEAKER, HOW_THEY_SPEAK, OTHER_SPEAKERS, TRAINED_FPS, frames_of, prepared
from .wav2vec import Wav2Vec, load_wav2vec

log = logging.getLogger("wanvideo")

# Repository -> the revision that holds the weights as safetensors.
SPEECH_MODELS = {"TencentGameMate/chinese-wav2vec2-base": "refs/pr/1", "facebook/wav2vec2-base-960h": "main"}
# Eleven hours at 25 frames a second; the loop of windows itself knows no end.
LONGEST = 1_000_000
LONGEST_TIP = "Longest video; where speakers talk in turn, longest speech of each"
NO_ENCODER = (
    "Silence is encoded by the speech encoder: connect Wav2VecModelLoader to 'wav2vec_model' of "
    "'MultiTalk Silent Embeds'."
)
SPEECH_WIDGETS = {
    "base_precision": (["fp32", "bf16", "fp16"], {"default": "fp16", "tooltip": "Of the encoder's weights"}),
    "load_device": (
        ["main_device", "offload_device"],
        {"default": "main_device", "tooltip": "On the GPU only while it encodes, either way"},
    ),
}


class Wav2VecModelLoader:
    """Loads a Wav2Vec2 encoder from models/wav2vec2."""

    DISPLAY_NAME = "Wav2vec2 Model Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WAV2VECMODEL",)
    RETURN_NAMES = ("wav2vec_model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (files("wav2vec2"), {"tooltip": "A Wav2Vec2 base encoder in models/wav2vec2"}),
                **SPEECH_WIDGETS,
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "", input_types: Types | None = None) -> bool:
        """A speech encoder, by its header."""

        def check(model: str) -> None:
            check_loadable(get_host().find_file("wav2vec2", model), cls.DISPLAY_NAME)

        return verdict(cls, check, input_types, model=model)

    def loadmodel(self, model: str, base_precision: str, load_device: str) -> tuple[Wav2Vec]:
        """Load it; it is on the compute device only while it encodes."""
        host = get_host()
        return (load_wav2vec(host.find_file("wav2vec2", model), dtype=DTYPES[base_precision], host=host),)


class DownloadAndLoadWav2VecModel:
    """Loads a Wav2Vec2 encoder, downloading its safetensors file the first time."""

    DISPLAY_NAME = "(Down)load Wav2Vec Model"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WAV2VECMODEL",)
    RETURN_NAMES = ("wav2vec_model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (list(SPEECH_MODELS), {"tooltip": "Kept in models/transformers"}),
                **SPEECH_WIDGETS,
            }
        }

    def loadmodel(self, model: str, base_precision: str, load_device: str) -> tuple[Wav2Vec]:
        """Use models/transformers/<model>, or fetch it there."""
        host = get_host()
        folder = host.models_dir("transformers") / model
        path = folder / "model.safetensors"
        if not path.is_file():
            log.info("Downloading %s to %s.", model, folder)
            _download(model, folder)
        return (load_wav2vec(path, dtype=DTYPES[base_precision], host=host),)


def _download(model: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(model, "model.safetensors", revision=SPEECH_MODELS[model], local_dir=folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RuntimeError(
            f"{model} could not be downloaded ({error}): put its model.safetensors into {folder} by hand, or use "
            "Wav2VecModelLoader."
        ) from error


class MultiTalkWav2VecEmbeds:
    """Encodes the speech of one to four people."""

    DISPLAY_NAME = "Multi/InfiniteTalk Wav2vec2 Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("MULTITALK_EMBEDS", "AUDIO", "INT")
    RETURN_NAMES = ("multitalk_embeds", "audio", "num_frames")
    RENAMED_INPUTS = {"audio": "audio_1"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "wav2vec_model": ("WAV2VECMODEL", {"tooltip": "Turns the sound into features; the Chinese base model"}),
                **FIRST_SPEAKER,
                "num_frames": ("INT", {"default": 81, "min": 1, "max": LONGEST, "step": 1, "tooltip": LONGEST_TIP}),
                **HOW_THEY_SPEAK,
            },
            "optional": {
                **OTHER_SPEAKERS,
                "add_noise_floor": ("BOOLEAN", {"default": False, "tooltip": "Faint noise at -45 dB in silent gaps"}),
                "smooth_transients": ("BOOLEAN", {"default": False, "tooltip": "Low-pass at 3 kHz"}),
            },
        }

    def process(
        self,
        wav2vec_model: Wav2Vec,
        normalize_loudness: bool,
        fps: float,
        num_frames: int,
        audio_1: dict[str, object],
        audio_scale: float,
        audio_cfg_scale: float | Sequence[float],
        multi_audio_type: str,
        audio_2: dict[str, object] | None = None,
        audio_3: dict[str, object] | None = None,
        audio_4: dict[str, object] | None = None,
        ref_target_masks: Tensor | None = None,
        add_noise_floor: bool = False,
        smooth_transients: bool = False,
    ) -> tuple[MultiTalkEmbeds, dict[str, object], int]:
        """Speech features, the mixed sound, and the frames that the sound lasts.

        At most num_frames, or for each speaker where they talk in turn. Raises ValueError where sounds and masks do not
        fit, or a sound holds NaN.
        """
        options = AudioOptions(
            normalize_loudness=normalize_loudness,
            add_noise_floor=add_noise_floor,
            smooth_transients=smooth_transients,
        )
        sequential = multi_audio_type == "add"
        sounds = prepared(
            (audio_1, audio_2, audio_3, audio_4), ref_target_masks, options, num_frames=num_frames, fps=fps,
            sequential=sequential,
        )  # fmt: skip
        longest = frames_of(sounds, num_frames, sequential=sequential)
        try:
            embeds = encode_speech(wav2vec_model, sounds, fps=fps, sequential=sequential, longest=longest)
        finally:
            wav2vec_model.managed.release()
        embeds = replace(embeds, scale=audio_scale, cfg_scale=audio_cfg_scale, masks=ref_target_masks)
        sound = mix(sounds, sequential=sequential, seconds=longest / fps)
        return embeds, sound, embeds.num_frames


class MultiTalkSilentEmbeds:
    """Speech features of silence, for a video with a shut mouth."""

    DISPLAY_NAME = "MultiTalk Silent Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("MULTITALK_EMBEDS",)
    RETURN_NAMES = ("multitalk_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "num_frames": (
                    "INT",
                    {"default": 81, "min": 1, "max": LONGEST, "step": 1, "tooltip": "Length at 25 fps"},
                )
            },
            "optional": {"wav2vec_model": ("WAV2VECMODEL", {"tooltip": "Encodes the silence"})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Types | None = None) -> bool:
        """An encoder."""
        return verdict(cls, lambda: need_link(input_types, "wav2vec_model", NO_ENCODER), input_types)

    def process(self, num_frames: int, wav2vec_model: Wav2Vec | None = None) -> tuple[MultiTalkEmbeds]:
        """Encoded silence of that length."""
        if wav2vec_model is None:
            raise ValueError(NO_ENCODER)
        try:
            silence = encode_silence(wav2vec_model, fps=TRAINED_FPS)
        finally:
            wav2vec_model.managed.release()
        return (silent_speech(silence, num_frames),)


def _speech(value: object, where: str) -> object:
    """Speech of this pack, also from the dict that nodes of other packs make of it."""
    if not isinstance(value, Mapping):
        return value
    features = value.get("audio_features")
    # A list, or one tensor of all speakers.
    features = () if features is None else tuple(features)
    if not features or not all(isinstance(part, Tensor) and part.dim() == 3 and len(part) for part in features):
        raise ValueError(f"{where} holds no speech: look at the node that cuts it, and at how long the sound is.")
    given = {field: value[name] for name, field in IN_DICT.items() if value.get(name) is not None}
    return MultiTalkEmbeds(**{**given, "features": features})


add_form("MULTITALK_EMBEDS", _speech)

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    Wav2VecModelLoader, DownloadAndLoadWav2VecModel, MultiTalkWav2VecEmbeds, MultiTalkSilentEmbeds
)
