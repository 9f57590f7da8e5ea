"""ComfyUI's own video nodes, and what else graphs do to sound and latents."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ...host import get_host
from ...node_tools import Inputs
from ...wanvideo.whole_file import partial_file, publish
from ..video_file import FORMATS, Encoding, Frames, Video, check_frames, encode_video, sound_beside
from .pictures import next_file

log = logging.getLogger("wanvideo")

Audio = dict[str, object]
Latent = dict[str, object]

FOREVER = 0xFFFFFFFFFFFFFFFF


class CreateVideo:
    """Frames and sound as one VIDEO."""

    FUNCTION = "create"
    RETURN_TYPES = ("VIDEO",)
    TAKES_FOLDERS = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "images": ("IMAGE",),
                "fps": ("FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0}),
            },
            "optional": {"audio": ("AUDIO",)},
        }

    def create(self, images: Frames, fps: float, audio: Audio | None = None) -> tuple[Video]:
        """Nothing is encoded yet."""
        return (Video(images, fps, audio),)


class SaveVideo:
    """Writes a VIDEO to the output folder as H.264 in MP4."""

    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    WRITES = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "video": ("VIDEO",),
                "filename_prefix": ("STRING", {"default": "video/ComfyUI"}),
                "format": (["auto", "mp4"], {"default": "auto"}),
                "codec": (["auto", "h264"], {"default": "auto"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str) -> bool:
        """A name that stays in the output folder."""
        next_file(get_host().output_dir(), filename_prefix, "_.mp4")
        return True

    def save(
        self,
        video: Video,
        filename_prefix: str,
        format: str,
        codec: str,
        prompt: object = None,
        extra_pnginfo: Mapping[str, object] | None = None,
    ) -> dict[str, object]:
        """The path of the file, which holds the workflow; its sound ends with its picture."""
        check_frames(video.images, filename_prefix)
        next_name = partial(next_file, get_host().output_dir(), filename_prefix, "_.mp4")
        saved = {"prompt": prompt, **(extra_pnginfo or {})}
        encoding = Encoding(fps=video.fps, metadata={name: json.dumps(v) for name, v in saved.items() if v})
        sound = None if video.audio is None else sound_beside(video.audio, len(video.images), video.fps)
        with partial_file(next_name().parent, "video.mp4") as unfinished:
            encode_video(unfinished, video.images, encoding, sound)
            path = publish(unfinished, next_name)
        return {"ui": {"videos": [str(path)]}}


class PreviewAnimation:
    """Writes pictures, masks, or masks upon pictures, to the temporary folder as an animated WebP."""

    FUNCTION = "preview"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"fps": ("FLOAT", {"default": 8.0, "min": 0.01, "max": 1000.0, "step": 0.01})},
            "optional": {"images": ("IMAGE",), "masks": ("MASK",)},
        }

    def preview(self, fps: float, images: Tensor | None = None, masks: Tensor | None = None) -> dict[str, object]:
        """The path of the file; masks upon pictures are white, as many as there are of both."""
        if images is None and masks is None:
            raise ValueError("PreviewAnimation has nothing to show: connect images or masks.")
        white = None if masks is None else masks[..., None]
        shown = white.expand(-1, -1, -1, 3) if images is None else images[..., :3]
        if images is not None and white is not None:
            count = min(len(images), len(white))
            shown = torch.lerp(shown[:count], torch.ones(()), white[:count])
        next_name = partial(next_file, get_host().temp_dir(), "AnimPreview", "_.webp")
        encoding = Encoding(fps=fps, format=FORMATS["image/webp"])
        with partial_file(next_name().parent, "preview.webp") as unfinished:
            encode_video(unfinished, shown, encoding)
            path = publish(unfinished, next_name)
        return {"ui": {"images": [str(path)]}}


class TrimAudioDuration:
    """A part of a sound."""

    FUNCTION = "trim"
    RETURN_TYPES = ("AUDIO",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "audio": ("AUDIO",),
                "start_index": ("FLOAT", {"default": 0.0, "min": -FOREVER, "max": FOREVER, "step": 0.01}),
                "duration": ("FLOAT", {"default": 60.0, "min": 0.0, "step": 0.01}),
            }
        }

    def trim(self, audio: Audio, start_index: float, duration: float) -> tuple[Audio]:
        """From start_index (negative: from the end) on, both in seconds."""
        waveform, rate = audio["waveform"], audio["sample_rate"]
        length = waveform.shape[-1]
        first = round(start_index * rate) + (length if start_index < 0 else 0)
        first = min(max(first, 0), max(length - 1, 0))
        part = waveform[..., first : first + round(duration * rate)]
        if not part.shape[-1]:
            raise ValueError(
                f"TrimAudioDuration leaves nothing of a sound of {length / rate:.2f} s: choose another start_index, or "
                "a longer duration."
            )
        return ({**audio, "waveform": part},)


class MelBandRoFormerModelLoader:
    """Names the model that would separate voices."""

    FUNCTION = "loadmodel"
    RETURN_TYPES = ("MELROFORMERMODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model_name": ("STRING", {"default": ""})}}

    def loadmodel(self, model_name: str) -> tuple[str]:
        """Nothing is loaded."""
        return (model_name,)


class MelBandRoFormerSampler:
    """Passes sound through: voices are not separated from music outside ComfyUI, which speech alone does not need."""

    FUNCTION = "process"
    RETURN_TYPES = ("AUDIO", "AUDIO")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": ("MELROFORMERMODEL",), "audio": ("AUDIO",)}}

    def process(self, model: str, audio: Audio) -> tuple[Audio, Audio]:
        """The whole sound as vocals, silence as instruments."""
        log.warning("Music is not separated from the voice: the whole sound is taken as speech. Give speech alone.")
        return audio, {**audio, "waveform": torch.zeros_like(audio["waveform"])}


class AudioSeparation:
    """Passes sound through, as MelBandRoFormerSampler (audio-separation-nodes-comfyui)."""

    FUNCTION = "main"
    RETURN_TYPES = ("AUDIO", "AUDIO", "AUDIO", "AUDIO")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        shapes = ["linear", "half_sine", "logarithmic", "exponential"]
        return {
            "required": {"audio": ("AUDIO",)},
            "optional": {
                "chunk_fade_shape": (shapes, {"default": "linear"}),
                "chunk_length": ("FLOAT", {"default": 10.0}),
                "chunk_overlap": ("FLOAT", {"default": 0.1}),
            },
        }

    def main(self, audio: Audio, **how: object) -> tuple[Audio, Audio, Audio, Audio]:
        """Silence as bass, drums and other; the whole sound as vocals."""
        vocals, silence = MelBandRoFormerSampler().process("", audio)
        return silence, silence, silence, vocals


class LoadLatent:
    """Latents from the input folder, as ComfyUI's SaveLatent and a failed run leave them."""

    FUNCTION = "load"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"latent": ("STRING", {"default": ""})}}

    @classmethod
    def VALIDATE_INPUTS(cls, latent: str) -> bool:
        """The file is there."""
        get_host().readable_file(latent)
        return True

    def load(self, latent: str) -> tuple[Latent]:
        """LATENT."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = get_host().readable_file(latent)
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path.name} is truncated or holds no latents ({error}); choose another.") from error
        if "latent_tensor" not in tensors or "latent_format_version_0" not in tensors:
            raise ValueError(f"{path.name} holds no latents of Wan; choose a file that SaveLatent wrote.")
        return ({"samples": tensors["latent_tensor"].float()},)


NODE_CLASS_MAPPINGS = {
    "CreateVideo": CreateVideo,
    "SaveVideo": SaveVideo,
    "PreviewAnimation": PreviewAnimation,
    "TrimAudioDuration": TrimAudioDuration,
    "MelBandRoFormerModelLoader": MelBandRoFormerModelLoader,
    "MelBandRoFormerSampler": MelBandRoFormerSampler,
    "AudioSeparation": AudioSeparation,
    "LoadLatent": LoadLatent,
}
