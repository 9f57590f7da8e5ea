"""Nodes that give a character and its poses to SCAIL."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..clip_image.extension import ClipImage
from ..node_tools import CATEGORY, Inputs, mappings, whole_frames
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .extension import PosedCharacter

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
STRENGTH = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
EMBEDS = ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the video, from WanVideo Empty Embeds"})
VAE = ("WANVAE", {"tooltip": "A Wan 2.1 VAE"})


class WanVideoAddSCAILReferenceEmbeds:
    """The character that the video shows."""

    DISPLAY_NAME = "WanVideo Add SCAIL Reference Embeds"
    DESCRIPTION = "The picture of a character for a SCAIL model; WanVideo Add SCAIL Pose Embeds says how it moves."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        start, end = "Part of the steps from which the picture is there", "Part of the steps up to which it is there"
        return {
            "required": {
                "embeds": EMBEDS,
                "vae": VAE,
                "ref_image": (
                    "IMAGE",
                    {"tooltip": "The character, at the width and height of the video; the first picture counts"},
                ),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "How much the picture counts"}),
                "start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": start}),
                "end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": end}),
            },
            "optional": {
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS", {"tooltip": "What CLIP sees in the picture"}),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        vae: WanVAE,
        ref_image: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        clip_embeds: ClipImage | None = None,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the picture, in the place of an earlier one."""
        embeds = _with(
            embeds,
            reference=_encoded(vae, ref_image[:1]),
            reference_strength=torch.tensor([float(strength)]),
            reference_steps=(start_percent, end_percent),
        )
        if clip_embeds is not None:
            others = tuple(payload for payload in embeds.payloads if not isinstance(payload, ClipImage))
            embeds = replace(embeds, payloads=(*others, clip_embeds))
        return (embeds,)


class WanVideoAddSCAILPoseEmbeds:
    """The poses that the character takes."""

    DISPLAY_NAME = "WanVideo Add SCAIL Pose Embeds"
    DESCRIPTION = "A video of rendered poses, at half the size of the new one, for a SCAIL model."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        poses = "Rendered poses of the whole video, at half of its width and height; its sides divide by 32 then"
        return {
            "required": {
                "embeds": EMBEDS,
                "vae": VAE,
                "pose_images": ("IMAGE", {"tooltip": poses}),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "How much the poses count"}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the poses are there"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the poses are there"},
                ),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        vae: WanVAE,
        pose_images: Tensor,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the poses, in the place of earlier ones."""
        poses = _encoded(vae, pose_images[: whole_frames(pose_images.shape[0])])
        return (_with(embeds, poses=poses, pose_strength=strength, pose_steps=(start_percent, end_percent)),)


def _encoded(vae: WanVAE, images: Tensor) -> Tensor:
    """Latents [1, C, F, h, w] of IMAGE."""
    try:
        return vae.encode(to_video(images))[None]
    finally:
        vae.managed.release()


def _with(embeds: ImageEmbeds, **parts: object) -> ImageEmbeds:
    """The embeds with what one node knows of the character, beside what the other does."""
    others = tuple(payload for payload in embeds.payloads if not isinstance(payload, PosedCharacter))
    before = next((p for p in embeds.payloads if isinstance(p, PosedCharacter)), PosedCharacter())
    return replace(embeds, payloads=(*others, replace(before, **parts)))


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddSCAILReferenceEmbeds, WanVideoAddSCAILPoseEmbeds)
