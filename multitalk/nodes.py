"""Nodes of MultiTalk and InfiniteTalk: the model's module, and the settings of the long-video loop."""

from __future__ import annotations

import datetime

from torch import Tensor

from ..host import get_host
from ..node_checks import Types, verdict
from ..node_tools import CATEGORY, Inputs, files, find_model, mappings, round_size
from ..wanvideo.conditioning import Payload
from ..wanvideo.frames import latent_frames
from ..wanvideo.images import to_video
from ..wanvideo.load_plan import ModuleFile
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds, payloads_of
from . import nodes_audio
from .colormatch import match_colors
from .extension import MultiTalk
from .loop import TalkingLoop
from .plan import check_lengths

COLOR_METHODS = ["disabled", "mkl", "hm", "reinhard", "mvgd", "hm-mvgd-hm", "hm-mkl-hm"]


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

    def loadmodel(self, model: str) -> tuple[ModuleFile]:
        """Find it."""
        return (ModuleFile(find_model(model), MultiTalk.file),)


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

    @classmethod
    def VALIDATE_INPUTS(
        cls, frame_window_size: int = 81, motion_frame: int = 25, input_types: Types | None = None
    ) -> bool:
        """Windows that bring something new."""
        lengths = {"frame_window_size": frame_window_size, "motion_frame": motion_frame}
        return verdict(cls, check_lengths, input_types, **lengths)

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
        clip_embeds: Payload | None = None,
        mode: str = "auto",
        output_path: str = "",
    ) -> tuple[ImageEmbeds, str]:
        """Picture and settings for the sampler."""
        width, height = round_size(width, height, vae)
        loop = TalkingLoop(
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

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        frame_window_size: int = 81,
        motion_frame: int = 5,
        drop_frames: int = 12,
        input_types: Types | None = None,
    ) -> bool:
        """Windows that bring something new."""
        lengths = {"frame_window_size": frame_window_size, "motion_frame": motion_frame, "drop_frames": drop_frames}
        return verdict(cls, check_lengths, input_types, **lengths)

    def process(
        self,
        vae: WanVAE,
        width: int,
        height: int,
        frame_window_size: int,
        motion_frame: int,
        drop_frames: int,
        force_offload: bool,
        colormatch: str,
        start_image: Tensor | None = None,
        tiled_vae: bool = False,
        clip_embeds: Payload | None = None,
        *,
        output_path: str = "",
        reference_video: Tensor | None = None,
    ) -> tuple[ImageEmbeds, str]:
        """Picture, reference and settings for the sampler."""
        width, height = round_size(width, height, vae)
        reference = None
        if reference_video is not None:
            images = reference_video[..., :3].float()
            if colormatch == "reinhard_torch" and start_image is not None:
                images = match_colors(images, start_image[0, ..., :3].float(), colormatch)
            reference = to_video(images, width, height)
        loop = TalkingLoop(
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


def _loop_embeds(loop: TalkingLoop, clip: Payload | None) -> ImageEmbeds:
    factor = loop.vae.spatial_factor
    shape = (loop.vae.latent_channels, latent_frames(loop.window_frames), loop.height // factor, loop.width // factor)
    return ImageEmbeds(latent_shape=shape, num_frames=loop.window_frames, payloads=payloads_of(clip), loop=loop)


def _output_folder(path: str, mode: str) -> str:
    if not path:
        return ""
    # Runs that start in the same second do not share a folder.
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S_%f")
    return str(get_host().writable_folder(path) / f"{stamp}_{mode}_output")


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    MultiTalkModelLoader,
    WanVideoImageToVideoMultiTalk,
    WanVideoImageToVideoSkyreelsv3_audio,
)
NODE_CLASS_MAPPINGS |= nodes_audio.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS |= nodes_audio.NODE_DISPLAY_NAME_MAPPINGS
