"""Nodes of HuMo: the speech encoder, conditions from sound and pictures, and what goes with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host import get_host
from ..node_checks import Types, verdict
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings, round_size, whole_frames
from ..wanvideo.advice import warn_of_cut
from ..wanvideo.finite import check_finite
from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import Tile, WanVAE
from ..wanvideo.request import ImageEmbeds
from .combine import combined
from .conditions import HuMoConditions, with_pictures
from .whisper import LARGE_WIDTH, LEVELS, SAMPLE_RATE, SAMPLES_A_FRAME, Whisper, load_whisper

log = logging.getLogger("wanvideo")

Audio = dict[str, object]

# num_frames: as many as the sound lasts.
LENGTH_OF_THE_SOUND = -1
# Louder or quieter than any sound: what the meter gives for silence.
NO_LOUDNESS = 100


class WhisperModelLoader:
    """Loads the encoder of Whisper large-v3, which HuMo hears with."""

    DESCRIPTION = "Loads the encoder of Whisper large-v3, which HuMo hears with."
    DISPLAY_NAME = "Whisper Model Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WHISPERMODEL",)
    RETURN_NAMES = ("whisper_model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        precision = {"default": "fp16", "tooltip": "fp16 is what the published file holds"}
        device = {"default": "main_device", "tooltip": "On the GPU only while it encodes, either way"}
        return {
            "required": {
                "model": (files("audio_encoders"), {"tooltip": "A Whisper encoder in models/audio_encoders"}),
                "base_precision": (["fp32", "bf16", "fp16"], precision),
                "load_device": (["main_device", "offload_device"], device),
            }
        }

    def loadmodel(self, model: str, base_precision: str, load_device: str) -> tuple[Whisper]:
        """Load it; it is on the compute device only while it encodes."""
        host = get_host()
        return (load_whisper(host.find_file("audio_encoders", model), dtype=DTYPES[base_precision], host=host),)


class HuMoEmbeds:
    """Conditions a HuMo video on speech and on pictures of who is in it."""

    DESCRIPTION = "Conditions a HuMo video on speech and on pictures of the people and things that are in it."
    DISPLAY_NAME = "HuMo Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        frames = {"min": -1, "max": 10000, "step": 1, "tooltip": "Frames of the video; -1: as many as the sound lasts"}
        guided = "Above 1: guidance by the sound, one more pass a step. It needs a cfg that is not 1"
        return {
            "required": {
                "num_frames": ("INT", {"default": 81, **frames}),
                "width": ("INT", {"default": 832, "min": 64, "max": 4096, "step": 16, "tooltip": "In pixels"}),
                "height": ("INT", {"default": 480, "min": 64, "max": 4096, "step": 16, "tooltip": "In pixels"}),
                "audio_scale": ("FLOAT", {**scale, "tooltip": "Strength of the sound"}),
                "audio_cfg_scale": ("FLOAT", {**scale, "tooltip": guided}),
                "audio_start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Where in the steps guidance by the sound begins"},
                ),
                "audio_end_percent": (
                    "FLOAT",
                    {"default": 1.0, **percent, "tooltip": "Where it ends; outside, the prompt alone guides"},
                ),
            },
            "optional": {
                "whisper_model": ("WHISPERMODEL", {"tooltip": "Needed for sound"}),
                "vae": ("WANVAE", {"tooltip": "Encodes the pictures, and the grey where there are none"}),
                "reference_images": ("IMAGE", {"tooltip": "Who and what the video shows, one picture each"}),
                "audio": ("AUDIO", {"tooltip": "Speech, best without music; without it the video is silent"}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": "Less memory for the VAE"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, num_frames: int = 81, input_types: Types | None = None) -> bool:
        """What the pictures, the sound and the length need."""
        links = input_types or {}
        return verdict(cls, lambda num_frames: _check(num_frames, links), links, num_frames=num_frames)

    def process(
        self,
        num_frames: int,
        width: int,
        height: int,
        audio_scale: float,
        audio_cfg_scale: float | Sequence[float],
        audio_start_percent: float,
        audio_end_percent: float,
        whisper_model: Whisper | None = None,
        vae: WanVAE | None = None,
        reference_images: Tensor | None = None,
        audio: Audio | None = None,
        tiled_vae: bool = False,
    ) -> tuple[ImageEmbeds]:
        """Features of the sound, encoded pictures, and the passes of guidance."""
        linked = {"whisper_model": whisper_model, "vae": vae, "audio": audio}
        _check(num_frames, {name for name, value in linked.items() if value is not None})
        width, height = round_size(width, height, vae)
        sound = None if audio is None else _mono(audio)
        if num_frames == LENGTH_OF_THE_SOUND:
            num_frames = len(sound) // SAMPLES_A_FRAME
        elif sound is not None:
            warn_of_cut("audio", len(sound) / SAMPLE_RATE, num_frames * SAMPLES_A_FRAME / SAMPLE_RATE)
        frames = whole_frames(num_frames)
        features = _heard(whisper_model, sound, frames)
        pictures = () if reference_images is None else to_video(reference_images, width, height).split(1, dim=1)
        tile = Tile() if tiled_vae else None
        # A view, which takes no memory; the encoder sees all of it, as its first latent frames differ from later ones.
        grey = torch.zeros(3, 1, 1, 1).expand(-1, frames + VAE_TIME_STRIDE * len(pictures), height, width)
        try:
            encoded = [vae.encode(picture, tile=tile) for picture in pictures]
            cond, empty = with_pictures(vae.encode(grey, tile=tile), encoded)
        finally:
            vae.managed.release()
        conditions = HuMoConditions(
            features=features,
            cond=cond,
            empty=empty,
            references=len(pictures),
            scale=audio_scale,
            cfg_scale=audio_cfg_scale,
            start=audio_start_percent,
            end=audio_end_percent,
        )
        channels, _, *sides = cond.shape[1:]
        shape = (vae.latent_channels, latent_frames(frames) + len(pictures), *sides)
        return (
            ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=(conditions,), trailing_latents=len(pictures)),
        )


def _check(num_frames: int, linked: Collection[str]) -> None:
    if "vae" not in linked:
        raise ValueError(
            "HuMoEmbeds encodes pictures, and grey where there are none: connect WanVideoVAELoader to 'vae'."
        )
    if "audio" in linked and "whisper_model" not in linked:
        raise ValueError("The sound is heard by Whisper: connect WhisperModelLoader to 'whisper_model' of HuMoEmbeds.")
    if num_frames == LENGTH_OF_THE_SOUND and "audio" not in linked:
        raise ValueError("num_frames -1 takes the length of the sound, but none is connected: give a number of frames.")
    if num_frames < 1 and num_frames != LENGTH_OF_THE_SOUND:
        raise ValueError(f"num_frames is {num_frames}: give at least 1, or -1 for the length of the sound.")


def _heard(whisper: Whisper | None, sound: NDArray[np.float32] | None, frames: int) -> Tensor:
    """Features [frames, 5, channels] of the sound; zeros where there is none."""
    if sound is None:
        return torch.zeros(frames, LEVELS, LARGE_WIDTH if whisper is None else whisper.width)
    try:
        return whisper.encode(sound)
    finally:
        whisper.managed.release()


def _mono(audio: Audio) -> NDArray[np.float32]:
    """AUDIO -> its channels' mean at 16 kHz. Raises ValueError for NaN or infinity."""
    check_finite("The sound holds", audio["waveform"])
    sound = audio["waveform"][0].float().mean(dim=0).cpu().numpy()
    rate = int(audio["sample_rate"])
    if rate == SAMPLE_RATE:
        return sound
    import soxr

    return soxr.resample(sound, rate, SAMPLE_RATE)


class WanVideoCombineEmbeds:
    """Joins two image embeds."""

    DESCRIPTION = "Joins two image embeds of the same size; what both bring is taken from the second."
    DISPLAY_NAME = "WanVideo Combine Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    EXPERIMENTAL = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "embeds_1": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Embeds of a video of the same size"}),
                "embeds_2": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Counts where both bring the same"}),
            }
        }

    def add(self, embeds_1: ImageEmbeds, embeds_2: ImageEmbeds) -> tuple[ImageEmbeds]:
        """Both as one."""
        return (combined(embeds_1, embeds_2),)


class NormalizeAudioLoudness:
    """Brings sound to a loudness."""

    DESCRIPTION = "Brings sound to a loudness by one gain (ITU-R BS.1770); silence stays as it is."
    DISPLAY_NAME = "Normalize Audio Loudness"
    CATEGORY = CATEGORY
    FUNCTION = "normalize"
    RETURN_TYPES = ("AUDIO",)
    RETURN_NAMES = ("audio",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        lufs = {"default": -23.0, "min": -100.0, "max": 0.0, "step": 0.1}
        tip = "Loudness in LUFS: closer to 0 is louder. Encoders of speech were trained at -23"
        return {"required": {"audio": ("AUDIO", {"tooltip": "Any sound"}), "lufs": ("FLOAT", {**lufs, "tooltip": tip})}}

    def normalize(self, audio: Audio, lufs: float) -> tuple[Audio]:
        """The sound at that loudness."""
        rate = int(audio["sample_rate"])
        sound = audio["waveform"].detach().float().cpu()
        sound = sound[None] if sound.dim() == 2 else sound
        louder = [torch.from_numpy(_at_loudness(part.T.numpy(), rate, lufs)).T for part in sound]
        return ({"waveform": torch.stack(louder).float().contiguous(), "sample_rate": rate},)


def _at_loudness(sound: NDArray[np.float32], rate: int, lufs: float) -> NDArray[np.floating]:
    """Sound [samples, channels] at that many LUFS. Raises ValueError where its loudness cannot be measured."""
    import pyloudnorm

    sound = np.ascontiguousarray(sound)
    try:
        loudness = pyloudnorm.Meter(rate).integrated_loudness(sound)
    except ValueError as error:
        raise ValueError(
            f"The loudness of {len(sound) / rate:.2f} s of sound in {sound.shape[1]} channels cannot be measured "
            f"({error}): give at least 0.4 s in at most five channels, or bypass NormalizeAudioLoudness."
        ) from error
    if not math.isfinite(loudness) or abs(loudness) > NO_LOUDNESS:
        return sound
    return pyloudnorm.normalize.loudness(sound, loudness, lufs)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WhisperModelLoader, HuMoEmbeds, WanVideoCombineEmbeds, NormalizeAudioLoudness
)
