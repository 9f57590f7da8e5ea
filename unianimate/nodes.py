"""The node that gives drawn poses to UniAnimate."""

from __future__ import annotations

from torch import Tensor

from ..node_tools import CATEGORY, Inputs, mappings
from .extension import Poses

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoUniAnimatePoseInput:
    """Drawn poses for UniAnimate."""

    DISPLAY_NAME = "WanVideo UniAnimate Pose Input"
    DESCRIPTION = (
        "Drawn poses that the video follows. Needs UniAnimate's LoRA at the 'lora' input of the model loader; connect "
        "it to unianimate_poses of the sampler."
    )
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("UNIANIMATE_POSE",)
    RETURN_NAMES = ("unianimate_poses",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "pose_images": ("IMAGE", {"tooltip": "Drawn poses, one a frame, at the size of the video"}),
                "strength": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": "How much the poses count"}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the poses act"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the poses act"},
                ),
            },
            "optional": {
                "reference_pose_image": (
                    "IMAGE",
                    {"tooltip": "The drawn pose of the picture that the video starts from, at the size of the video"},
                ),
            },
        }

    def process(
        self,
        pose_images: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        reference_pose_image: Tensor | None = None,
    ) -> tuple[Poses]:
        """The poses as the model reads them."""
        video = pose_images[..., :3].permute(3, 0, 1, 2)[None].contiguous()
        reference = None
        if reference_pose_image is not None:
            reference = reference_pose_image[:1, ..., :3].permute(0, 3, 1, 2).contiguous()
        return (Poses(video, reference, strength, start_percent, end_percent),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoUniAnimatePoseInput)
