"""The nodes of ReCamMaster: paths of a camera, a picture of one, and the source video filmed along it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.request import ImageEmbeds
from .cameras import PATHS, orbit, path, relative_poses
from .extension import CameraChange
from .plot import draw

SOURCE = ("LATENT", {"tooltip": "The source video, from WanVideoEncode"})
POSES = ("CAMERAPOSES", {"tooltip": "A path of the camera, one pose a latent frame; from another ReCamMaster node"})


class WanVideoReCamMasterDefaultCamera:
    """One of the ten camera paths that ReCamMaster was shown with."""

    DISPLAY_NAME = "WanVideo ReCamMaster Default Camera"
    DESCRIPTION = "One of ten simple camera paths for ReCamMaster, of up to 81 frames."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("CAMERAPOSES",)
    RETURN_NAMES = ("camera_poses",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        kinds = {"default": "pan_right", "tooltip": "How the camera moves: it turns, tilts, goes, or goes around"}
        return {"required": {"camera_type": (list(PATHS), kinds), "latents": SOURCE}}

    def process(self, camera_type: str, latents: Latent) -> tuple[np.ndarray]:
        """As many poses [n, 4, 4] as the source has latent frames."""
        return (path(camera_type, _pixel_frames(latents["samples"].shape[2])),)


class WanVideoReCamMasterGenerateOrbitCamera:
    """A camera that turns on a small circle."""

    DISPLAY_NAME = "WanVideo ReCamMaster Generate Orbit Camera"
    DESCRIPTION = "A camera path for ReCamMaster that turns evenly by some degrees, of any length."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("CAMERAPOSES",)
    RETURN_NAMES = ("camera_poses",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        frames = {"default": 81, "min": 1, "max": 1000, "step": 1, "tooltip": "Frames of the source video"}
        degrees = {"default": 90, "min": -180, "max": 180, "step": 1, "tooltip": "Turn over the whole video"}
        return {"required": {"num_frames": ("INT", frames), "degrees": ("INT", degrees)}}

    def process(self, degrees: int, num_frames: int) -> tuple[np.ndarray]:
        """One pose [4, 4] for every fourth frame."""
        return (orbit(num_frames, degrees),)


class WanVideoReCamMasterCameraEmbed:
    """The source video and the new path of its camera."""

    DISPLAY_NAME = "WanVideo ReCamMaster Camera Embed"
    DESCRIPTION = "Films a given video anew along another path of the camera, with a ReCamMaster model."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "CAMERAPOSES")
    RETURN_NAMES = ("camera_embeds", "camera_poses")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"camera_poses": POSES, "latents": SOURCE}}

    def process(self, camera_poses: np.ndarray, latents: Latent) -> tuple[ImageEmbeds, np.ndarray]:
        """Embeds of the source's size and length. Raises ValueError where the path has another length."""
        source = latents["samples"][:1].float()
        frames = source.shape[2]
        if len(camera_poses) != frames:
            raise ValueError(
                f"The camera path has {len(camera_poses)} poses but the source video {frames} latent frames: make a "
                f"path of {_pixel_frames(frames)} frames."
            )
        change = CameraChange(torch.from_numpy(relative_poses(camera_poses))[None], source)
        embeds = ImageEmbeds(
            latent_shape=tuple(source.shape[1:]), num_frames=_pixel_frames(frames), payloads=(change,)
        )
        return embeds, camera_poses


class ReCamMasterPoseVisualizer:
    """A plot of a camera's path."""

    DISPLAY_NAME = "ReCamMaster Pose Visualizer"
    DESCRIPTION = "Draws a camera path in three dimensions, a pyramid for each pose. Needs the package matplotlib."
    CATEGORY = CATEGORY
    FUNCTION = "plot"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 0, "max": 100, "step": 0.01}
        return {
            "required": {
                "camera_poses": POSES,
                "base_xval": ("FLOAT", {"default": 0.2, **size, "tooltip": "Half the width of a pyramid"}),
                "zval": ("FLOAT", {"default": 0.3, **size, "tooltip": "Depth of a pyramid"}),
                "scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.01, "max": 10.0, "step": 0.01, "tooltip": "How much space is shown"},
                ),
                "arrow_length": (
                    "FLOAT",
                    {"default": 1, **size, "tooltip": "Length of an arrow to where the camera looks; 0 for none"},
                ),
            }
        }

    def plot(
        self, camera_poses: np.ndarray, scale: float, base_xval: float, zval: float, arrow_length: float
    ) -> tuple[Tensor]:
        """The picture [1, H, W, 4]."""
        return (draw(camera_poses, half_width=base_xval, depth=zval, scale=scale, arrow=arrow_length),)


def _pixel_frames(latents: int) -> int:
    return VAE_TIME_STRIDE * (latents - 1) + 1


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoReCamMasterCameraEmbed,
    ReCamMasterPoseVisualizer,
    WanVideoReCamMasterGenerateOrbitCamera,
    WanVideoReCamMasterDefaultCamera,
)
