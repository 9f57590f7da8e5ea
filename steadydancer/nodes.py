"""The node that gives encoded poses to SteadyDancer."""

from __future__ import annotations

from dataclasses import replace

from ..clip_image.extension import ClipImage
from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.request import ImageEmbeds
from .extension import DancePoses

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
STRENGTH = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}


class WanVideoAddSteadyDancerEmbeds:
    """Poses that the picture dances to."""

    DISPLAY_NAME = "WanVideo Add SteadyDancer Embeds"
    DESCRIPTION = "A pose video that the picture of an image-to-video run dances to, with a SteadyDancer model."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The picture, from WanVideo ImageToVideo Encode"}),
                "pose_latents_positive": (
                    "LATENT",
                    {"tooltip": "The pose video, from WanVideo Encode, of the size and length of the video"},
                ),
                "pose_strength_spatial": ("FLOAT", {**STRENGTH, "tooltip": "How much the structure of poses counts"}),
                "pose_strength_temporal": ("FLOAT", {**STRENGTH, "tooltip": "How much the motion of poses counts"}),
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
                "pose_latents_negative": (
                    "LATENT",
                    {"tooltip": "The poses of the negative pass, such as an encoded black video; for a cfg above 1"},
                ),
                "clip_vision_embeds": (
                    "WANVIDIMAGE_CLIPEMBEDS",
                    {"tooltip": "What CLIP sees in the first pose; added to what it sees in the picture"},
                ),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        pose_latents_positive: Latent,
        pose_strength_spatial: float,
        pose_strength_temporal: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        pose_latents_negative: Latent | None = None,
        clip_vision_embeds: ClipImage | None = None,
    ) -> tuple[ImageEmbeds]:
        """The embeds with the poses."""
        negative = None if pose_latents_negative is None else pose_latents_negative["samples"][:1].float()
        positive = pose_latents_positive["samples"][:1].float()
        if negative is not None and negative.shape != positive.shape:
            raise ValueError(
                f"pose_latents_positive are {tuple(positive.shape[1:])} but pose_latents_negative "
                f"{tuple(negative.shape[1:])}: encode both at the same width, height and length."
            )
        poses = DancePoses(
            positive, negative, pose_strength_spatial, pose_strength_temporal, start_percent, end_percent
        )
        payloads = embeds.payloads
        if clip_vision_embeds is not None:
            payloads = _with_pose(payloads, clip_vision_embeds)
        return (replace(embeds, payloads=(*payloads, poses)),)


def _with_pose(payloads: tuple[object, ...], pose: ClipImage) -> tuple[object, ...]:
    """What CLIP sees in the first pose, beside what it sees in the picture."""
    if not any(isinstance(payload, ClipImage) for payload in payloads):
        raise ValueError(
            "clip_vision_embeds of the pose are added to those of the picture, which are not there: connect "
            "clip_embeds of WanVideoImageToVideoEncode, too."
        )
    return tuple(replace(p, added=pose.positive) if isinstance(p, ClipImage) else p for p in payloads)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddSteadyDancerEmbeds)
