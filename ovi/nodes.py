"""Nodes of Ovi: the VAE of sound, latents of sound, guidance of sound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..host import get_host
from ..node_tools import DTYPES, Inputs, Latent, files, mappings
from ..wanvideo.guidance import per_step
from ..wanvideo.request import TextEmbeds
from .run import SOUND
from .sound import SAMPLE_RATE, SoundVae, load_sound_vae
from .stream import OviText

log = logging.getLogger("wanvideo")

CATEGORY = "WanVideoWrapper/Ovi"
CHANNELS = 20
Audio = dict[str, object]
SOUND_VAE = ("MMAUDIOVAE", {"tooltip": "From Ovi MMAudio VAE Loader"})


class OviMMAudioVAELoader:
    """Loads MMAudio's VAE and its vocoder."""

    DISPLAY_NAME = "Ovi MMAudio VAE Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("MMAUDIOVAE",)
    RETURN_NAMES = ("mmaudio_vae",)
    DESCRIPTION = "Loads the VAE and the vocoder that make Ovi's sound, both as safetensors."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        names = files("vae", "mmaudio")
        vae = "MMAudio's VAE for 16 kHz, in models/vae or models/mmaudio"
        vocoder = "The BigVGAN vocoder (best_netG), in models/vae or models/mmaudio"
        return {
            "required": {
                "vae": (names, {"tooltip": vae}),
                "vocoder": (names, {"tooltip": vocoder}),
                "precision": (["bf16", "fp16", "fp32"], {"default": "bf16", "tooltip": "fp32 sounds cleanest"}),
            }
        }

    def loadmodel(self, vae: str, vocoder: str, precision: str) -> tuple[SoundVae]:
        """Both models."""
        host = get_host()
        known = host.list_files("vae")
        paths = [host.find_file("vae" if name in known else "mmaudio", name) for name in (vae, vocoder)]
        return (load_sound_vae(*paths, dtype=DTYPES[precision], host=host),)


class WanVideoEmptyMMAudioLatents:
    """Says how long Ovi's sound is."""

    DISPLAY_NAME = "WanVideo Empty MMAudio Latents"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = "How long the sound is: 157 for 5 seconds (121 frames), 314 for 10 seconds (241 frames)."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        length = {"default": 157, "min": 1, "max": 10000, "step": 1, "tooltip": "31.25 a second: 157 or 314"}
        return {"required": {"length": ("INT", length)}}

    def decode(self, length: int) -> tuple[Latent]:
        """Zeros, in whose place the sampler puts noise."""
        return ({SOUND: torch.zeros(length, CHANNELS)},)


class WanVideoEncodeOviAudio:
    """Encodes sound to latents."""

    DISPLAY_NAME = "WanVideo Encode Ovi Audio"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = "Sound as latents for Ovi's sampler, which starts from them; several channels are averaged."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mmaudio_vae": SOUND_VAE, "audio": ("AUDIO", {"tooltip": "The sound, at any rate"})}}

    def decode(self, mmaudio_vae: SoundVae, audio: Audio) -> tuple[Latent]:
        """The latents. Raises ValueError for sound that is too short."""
        sound, rate = audio["waveform"][0].float().mean(dim=0).cpu(), int(audio["sample_rate"])
        if rate != SAMPLE_RATE:
            import soxr

            sound = torch.from_numpy(soxr.resample(sound.numpy(), rate, SAMPLE_RATE))
        return ({SOUND: mmaudio_vae.encode(sound)},)


class WanVideoDecodeOviAudio:
    """Decodes Ovi's sound."""

    DISPLAY_NAME = "WanVideo Decode Ovi Audio"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("AUDIO",)
    RETURN_NAMES = ("audio",)
    DESCRIPTION = "The sound that the sampler made beside the video, at 16 kHz."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mmaudio_vae": SOUND_VAE, "samples": ("LATENT", {"tooltip": "Of an Ovi model's sampler"})}}

    def decode(self, mmaudio_vae: SoundVae, samples: Latent) -> tuple[Audio]:
        """The sound. Raises ValueError for samples that have none."""
        latents = samples.get(SOUND)
        if latents is None or latents.dim() != 3:
            raise ValueError("The samples have no sound: connect those of a sampler that ran an Ovi model.")
        return ({"waveform": mmaudio_vae.decode(latents), "sample_rate": SAMPLE_RATE},)


class WanVideoOviCFG:
    """Guides Ovi's sound apart from its video."""

    DISPLAY_NAME = "WanVideo Ovi CFG"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)
    DESCRIPTION = "How strictly the sound follows the prompt, and what it avoids; acts where cfg is not 1."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "In the place of cfg; 3 is usual, or a list with one value a step"
        scale = {"default": 3.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": tip}
        avoid = "What the sound avoids, as the positive prompt of its embeds: 'robotic, muffled, echo, distorted'"
        return {
            "required": {
                "original_text_embeds": ("WANVIDEOTEXTEMBEDS", {"tooltip": "The prompts of the video"}),
                "ovi_audio_cfg": ("FLOAT", scale),
            },
            "optional": {"ovi_negative_text_embeds": ("WANVIDEOTEXTEMBEDS", {"tooltip": avoid})},
        }

    def process(
        self,
        original_text_embeds: TextEmbeds,
        ovi_audio_cfg: float | Sequence[float],
        ovi_negative_text_embeds: TextEmbeds | None = None,
    ) -> tuple[TextEmbeds]:
        """The embeds with guidance of the sound in the place of any before."""
        avoided = ovi_negative_text_embeds
        if avoided is None:
            log.info("WanVideoOviCFG: the sound has no prompt to avoid; it is guided by what the video avoids alone.")
            avoided = original_text_embeds
        others = tuple(p for p in original_text_embeds.payloads if not isinstance(p, OviText))
        text = OviText(avoided.positive, per_step(ovi_audio_cfg))
        return (replace(original_text_embeds, payloads=(*others, text)),)


class WanVideoAddOviAudioToLatents:
    """Puts sound beside a video's latents."""

    DISPLAY_NAME = "WanVideo Add MMAudio To Latents"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = "One LATENT of a video and of sound, for the sampler of an Ovi model or for decoding."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "original_samples": ("LATENT", {"tooltip": "The video's latents"}),
                "audio_samples": ("LATENT", {"tooltip": "The sound's latents"}),
            }
        }

    def decode(self, original_samples: Latent, audio_samples: Latent) -> tuple[Latent]:
        """Both in one."""
        return ({**original_samples, **audio_samples},)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    OviMMAudioVAELoader,
    WanVideoEmptyMMAudioLatents,
    WanVideoEncodeOviAudio,
    WanVideoDecodeOviAudio,
    WanVideoOviCFG,
    WanVideoAddOviAudioToLatents,
)
