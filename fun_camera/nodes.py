"""The node that makes camera paths for Fun Control Camera models."""

from __future__ import annotations

from collections.abc import Sequence

from ..node_tools import CATEGORY, Inputs, mappings, round_size, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.request import ImageEmbeds
from .extension import CameraPath
from .plucker import by_latent_frame, rays

LATENT_CHANNELS = 16
LATENT_FACTOR = 8
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoFunCameraEmbeds:
    """The path of the camera, and the size and length of the video that goes with it."""

    DISPLAY_NAME = "WanVideo FunCamera Embeds"
    DESCRIPTION = (
        "Camera motion for Fun Control Camera models. Connect it to control_embeds of WanVideoImageToVideoEncode or "
        "WanVideoEmptyEmbeds."
    )
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "poses": ("CAMERACTRL_POSES", {"tooltip": "Camera poses, one a frame of the video"}),
                "width": (
                    "INT",
                    {"default": 832, "min": 64, "max": 2048, "step": 8, "tooltip": "Width of the video, in pixels"},
                ),
                "height": (
                    "INT",
                    {"default": 480, "min": 64, "max": 29048, "step": 8, "tooltip": "Height of the video, in pixels"},
                ),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Factor of the path before the model reads it"},
                ),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the camera moves"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the camera moves"},
                ),
            }
        }

    def process(
        self,
        poses: Sequence[Sequence[float]],
        width: int,
        height: int,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> tuple[ImageEmbeds]:
        """The path, and sizes for the sampler."""
        width, height = round_size(width, height)
        frames = whole_frames(len(poses))
        path = by_latent_frame(rays([[float(x) for x in pose] for pose in poses[:frames]], width, height)) * strength
        shape = (LATENT_CHANNELS, latent_frames(frames), height // LATENT_FACTOR, width // LATENT_FACTOR)
        payloads = (CameraPath(path, start_percent, end_percent),)
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=payloads),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoFunCameraEmbeds)
