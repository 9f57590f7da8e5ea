"""Nodes of MultiTalk and InfiniteTalk: speech in, settings of the long-video loop out."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..host import get_host
from ..node_tools import CATEGORY, DTYPES, files, find_model, mappings, round_size
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.payloads import ClipEmbeds, ImageEmbeds, LoopSettings, latent_frames
from .audio import (
    AudioOptions,
    MultiTalkEmbeds,
    encode_silence,
    encode_speech,
    mix,
    prepare_sound,
    silent_speech,
)
from .colormatch import match_colors
from .speakers import check_masks, check_painted
from .wav2vec import Wav2Vec, load_wav2vec

log = logging.getLogger("wanvideo")

Inputs = dict[str, dict[str, tuple[object, ...]]]

# Repository -> the revision that holds the weights as safetensors.
SPEECH_MODELS = {"TencentGameMate/chinese-wav2vec2-base": "refs/pr/1", "facebook/wav2vec2-base-960h": "main"}
COLOR_METHODS = ["disabled", "mkl", "hm", "reinhard", "mvgd", "hm-mvgd-hm", "hm-mkl-hm"]
TRAINED_FPS = 25.0
SPEECH_WIDGETS = {
    "base_precision": (["fp32", "bf16", "fp16"], {"default": "fp16"}),
    "load_device": (
        ["main_device", "offload_device"],
        {"default": "main_device", "tooltip": "On the GPU only while it encodes, either way"},
    ),
}


@dataclass(frozen=True)
class MultiTalkFile:
    """A module file that WanVideoModelLoader joins to the transformer (socket MULTITALKMODEL)."""

    path: Path


class MultiTalkModelLoader:
    """Chooses the MultiTalk or InfiniteTalk weights; the model loader reads them."""

    DISPLAY_NAME = "Multi/InfiniteTalk Model Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("MULTITALKMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (
                    files("unet_gguf", "diffusion_models"),
                    {"tooltip": "A MultiTalk or InfiniteTalk module in models/diffusion_models"},
                ),
            }
        }

    def loadmodel(self, model: str) -> tuple[MultiTalkFile]:
        """Find it."""
        return (MultiTalkFile(find_model(model)),)


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
                "model": (list(SPEECH_MODELS), {}),
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

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        return {
            "required": {
                "wav2vec_model": ("WAV2VECMODEL",),
                "audio_1": ("AUDIO",),
                "normalize_loudness": ("BOOLEAN", {"default": True, "tooltip": "To -23 LUFS"}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 1, "tooltip": "Longest video"}),
                "fps": (
                    "FLOAT",
                    {"default": 25.0, "min": 1.0, "max": 60.0, "step": 0.1, "tooltip": "Models were trained at 25"},
                ),
                "audio_scale": ("FLOAT", {**strength, "tooltip": "Strength of the speech"}),
                "audio_cfg_scale": ("FLOAT", {**strength, "tooltip": "Above 1: one more pass a step, more motion"}),
                "multi_audio_type": (["para", "add"], {"default": "para", "tooltip": "At once, or in turn"}),
            },
            "optional": {
                "audio_2": ("AUDIO",),
                "audio_3": ("AUDIO",),
                "audio_4": ("AUDIO",),
                "ref_target_masks": ("MASK", {"tooltip": "Where each speaker is, in the order of the audio"}),
                "add_noise_floor": ("BOOLEAN", {"default": False, "tooltip": "Faint noise at -45 dB in silent gaps"}),
                "smooth_transients": ("BOOLEAN", {"default": False, "tooltip": "Low-pass at 3 kHz"}),
            },
        }

    def process(
        self,
        wav2vec_model: Wav2Vec,
        audio_1: dict[str, object],
        normalize_loudness: bool,
        num_frames: int,
        fps: float,
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
        """Speech features, the mixed sound, and the frames that the sound lasts (at most num_frames)."""
        if fps != TRAINED_FPS:
            log.warning("The audio layers were trained at 25 fps; at %s the lips may drift.", fps)
        options = AudioOptions(
            normalize_loudness=normalize_loudness,
            add_noise_floor=add_noise_floor,
            smooth_transients=smooth_transients,
        )
        given = {"audio_1": audio_1, "audio_2": audio_2, "audio_3": audio_3, "audio_4": audio_4}
        audios = {name: audio for name, audio in given.items() if audio is not None}
        check_masks(ref_target_masks, list(audios))
        check_painted(ref_target_masks, list(audios))
        sounds = [prepare_sound(audio, num_frames / fps, options) for audio in audios.values()]
        sequential = multi_audio_type == "add"
        try:
            embeds = encode_speech(wav2vec_model, sounds, fps=fps, sequential=sequential)
        finally:
            wav2vec_model.managed.release()
        embeds = replace(embeds, scale=audio_scale, cfg_scale=audio_cfg_scale, masks=ref_target_masks)
        sound = mix(sounds, sequential=sequential)
        return embeds, sound, min(num_frames, embeds.num_frames)


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
            "required": {"num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 1})},
            "optional": {"wav2vec_model": ("WAV2VECMODEL", {"tooltip": "Encodes the silence"})},
        }

    def process(self, num_frames: int, wav2vec_model: Wav2Vec | None = None) -> tuple[MultiTalkEmbeds]:
        """Encoded silence of that length."""
        if wav2vec_model is None:
            raise ValueError(
                "Silence is encoded by the speech encoder: connect Wav2VecModelLoader to 'wav2vec_model' of "
                "'MultiTalk Silent Embeds'."
            )
        try:
            silence = encode_silence(wav2vec_model, fps=TRAINED_FPS)
        finally:
            wav2vec_model.managed.release()
        return (silent_speech(silence, num_frames),)


class WanVideoImageToVideoMultiTalk:
    """Settings of a talking video of any length, made in windows that share frames."""

    DISPLAY_NAME = "WanVideo Long I2V Multi/InfiniteTalk"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "STRING")
    RETURN_NAMES = ("image_embeds", "output_path")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "vae": ("WANVAE",),
                "width": ("INT", {"default": 832, "min": 64, "max": 2048, "step": 8}),
                "height": ("INT", {"default": 480, "min": 64, "max": 29048, "step": 8}),
                "frame_window_size": (
                    "INT",
                    {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": "Frames sampled at once"},
                ),
                "motion_frame": (
                    "INT",
                    {"default": 25, "min": 1, "max": 10000, "step": 1, "tooltip": "Frames that windows share"},
                ),
                "force_offload": ("BOOLEAN", {"default": False, "tooltip": "Free the GPU for the VAE between windows"}),
                "colormatch": (COLOR_METHODS, {"default": "disabled", "tooltip": "Match colours to the start image"}),
            },
            "optional": {
                "start_image": ("IMAGE", {"tooltip": "The picture that talks; several are used window by window"}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": "Less memory for the VAE"}),
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS", {"tooltip": "CLIP features of the picture"}),
                "mode": (["auto", "multitalk", "infinitetalk"], {"default": "auto", "tooltip": "auto: by the model"}),
                "output_path": ("STRING", {"default": "", "tooltip": "A folder for the frames, instead of memory"}),
            },
        }

    def process(
        self,
        vae: WanVAE,
        width: int,
        height: int,
        frame_window_size: int,
        motion_frame: int,
        force_offload: bool,
        colormatch: str,
        start_image: Tensor | None = None,
        tiled_vae: bool = False,
        clip_embeds: ClipEmbeds | None = None,
        mode: str = "auto",
        output_path: str = "",
    ) -> tuple[ImageEmbeds, str]:
        """Picture and settings for the sampler."""
        width, height = round_size(width, height)
        loop = LoopSettings(
            vae=vae,
            width=width,
            height=height,
            window_frames=frame_window_size,
            motion_frames=motion_frame,
            mode=mode,
            colormatch=colormatch,
            start_images=None if start_image is None else to_video(start_image, width, height),
            tiled_vae=tiled_vae,
            offload_between_windows=force_offload,
            output_path=_output_folder(output_path, mode),
        )
        return _loop_embeds(loop, clip_embeds), loop.output_path


class WanVideoImageToVideoSkyreelsv3_audio:  # noqa: N801 - the name in saved graphs
    """Settings of a SkyReels V3 talking avatar of any length, made in windows that share frames."""

    DISPLAY_NAME = "WanVideo Long SkyReelsV3 A2V"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "STRING")
    RETURN_NAMES = ("image_embeds", "output_path")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        shared = WanVideoImageToVideoMultiTalk.INPUT_TYPES()
        required, optional = shared["required"], shared["optional"]
        motion = {"default": 5, "min": 1, "max": 10000, "step": 1, "tooltip": "Frames that windows share"}
        drop = {"default": 12, "min": 0, "max": 10000, "step": 1, "tooltip": "Frames cut from the end of windows"}
        colors = [COLOR_METHODS[0], "reinhard_torch", *COLOR_METHODS[1:]]
        video = {"tooltip": "Gives each window the frame that it ends with"}
        return {
            "required": {
                **{name: required[name] for name in ("vae", "width", "height", "frame_window_size")},
                "motion_frame": ("INT", motion),
                "drop_frames": ("INT", drop),
                "tiled_vae": optional["tiled_vae"],
                "force_offload": required["force_offload"],
                "colormatch": (colors, required["colormatch"][1]),
            },
            "optional": {
                "start_image": optional["start_image"],
                "reference_video": ("IMAGE", video),
                "clip_embeds": optional["clip_embeds"],
                "output_path": optional["output_path"],
            },
        }

    def process(
        self,
        vae: WanVAE,
        width: int,
        height: int,
        frame_window_size: int,
        motion_frame: int,
        drop_frames: int,
        tiled_vae: bool,
        force_offload: bool,
        colormatch: str,
        start_image: Tensor | None = None,
        reference_video: Tensor | None = None,
        clip_embeds: ClipEmbeds | None = None,
        output_path: str = "",
    ) -> tuple[ImageEmbeds, str]:
        """Picture, reference and settings for the sampler."""
        width, height = round_size(width, height)
        reference = None
        if reference_video is not None:
            images = reference_video[..., :3].float()
            if colormatch == "reinhard_torch" and start_image is not None:
                images = match_colors(images, start_image[0, ..., :3].float(), colormatch)
            reference = to_video(images, width, height)
        loop = LoopSettings(
            vae=vae,
            width=width,
            height=height,
            window_frames=frame_window_size,
            motion_frames=motion_frame,
            mode="skyreelsv3",
            colormatch=colormatch,
            start_images=None if start_image is None else to_video(start_image, width, height),
            tiled_vae=tiled_vae,
            offload_between_windows=force_offload,
            output_path=_output_folder(output_path, "multitalk"),
            drop_frames=drop_frames,
            reference_video=reference,
        )
        return _loop_embeds(loop, clip_embeds), loop.output_path


def _loop_embeds(loop: LoopSettings, clip: ClipEmbeds | None) -> ImageEmbeds:
    factor = loop.vae.spatial_factor
    shape = (loop.vae.latent_channels, latent_frames(loop.window_frames), loop.height // factor, loop.width // factor)
    return ImageEmbeds(latent_shape=shape, num_frames=loop.window_frames, clip=clip, loop=loop)


def _output_folder(path: str, mode: str) -> str:
    if not path:
        return ""
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    return str(get_host().writable_folder(path) / f"{stamp}_{mode}_output")


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    MultiTalkModelLoader,
    Wav2VecModelLoader,
    DownloadAndLoadWav2VecModel,
    MultiTalkWav2VecEmbeds,
    MultiTalkSilentEmbeds,
    WanVideoImageToVideoMultiTalk,
    WanVideoImageToVideoSkyreelsv3_audio,
)
