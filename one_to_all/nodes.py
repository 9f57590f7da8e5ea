"""Nodes of One-to-All: the reference, the poses, and frames of an earlier video to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.guidance import per_step
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .continuing import TokenReplacement
from .extension import Animation

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
STRENGTH = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
SIDE = 8
PAD, ERROR = "pad_with_last", "error"


class WanVideoAddOneToAllReferenceEmbeds:
    """The same embeds with the picture that is to move."""

    DISPLAY_NAME = "WanVideo Add OneToAll Reference Embeds"
    DESCRIPTION = "The picture that a One-to-All model moves; it need not be aligned with the poses."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        start, end = "Part of the steps from which the picture is there", "Part of the steps up to which it is there"
        mask = "1 where the picture shows nothing to be kept, as the pose detector of One-to-All gives it"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the video"}),
                "vae": ("WANVAE", {"tooltip": "The VAE of the model; encodes the picture"}),
                "ref_image": ("IMAGE", {"tooltip": "The picture, at the width and height of the video"}),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "How much blocks take from the picture"}),
                "start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": start}),
                "end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": end}),
            },
            "optional": {"ref_mask": ("MASK", {"tooltip": mask})},
        }

    def add(
        self,
        embeds: ImageEmbeds,
        vae: WanVAE,
        ref_image: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        ref_mask: Tensor | None = None,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the reference, in the place of an earlier one. Raises ValueError for pictures of other sizes."""
        _check_size("ref_image", ref_image.shape[1:3], embeds, vae.spatial_factor)
        # ComfyUI's empty mask of a picture without alpha has a size of its own.
        if ref_mask is not None and not ref_mask.any():
            ref_mask = None
        if ref_mask is not None:
            _check_size("ref_mask", ref_mask.shape[-2:], embeds, vae.spatial_factor)
        try:
            picture = vae.encode(to_video(ref_image[:1]))
            black = vae.encode(to_video(torch.zeros_like(ref_image[:1, ..., :3])))
            mask = black if ref_mask is None else vae.encode(_mask_video(ref_mask))
        finally:
            vae.managed.release()
        parts = {
            "reference": torch.cat((picture, mask))[None],
            "empty": torch.cat((black, black))[None],
            "ref_strength": torch.tensor(strength),
            "ref_start": start_percent,
            "ref_end": end_percent,
        }
        return (_with_parts(embeds, parts),)


class WanVideoAddOneToAllPoseEmbeds:
    """The same embeds with the poses that the picture moves by."""

    DISPLAY_NAME = "WanVideo Add OneToAll Pose Embeds"
    DESCRIPTION = "The drawn poses that a One-to-All model moves its reference by."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        start, end = "Part of the steps from which the poses act", "Part of the steps up to which the poses act"
        poses = "Drawn poses, one for each frame, at the width and height of the video"
        prefix = "The drawn pose of the reference picture; empty: the first of pose_images"
        cfg = "Guidance by the poses, in a third pass of the model; no effect at 1, or at a cfg of 1 in the sampler"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The reference, or the size and length of the video"}),
                "pose_images": ("IMAGE", {"tooltip": poses}),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "How strongly the poses steer"}),
                "start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": start}),
                "end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": end}),
            },
            "optional": {
                "pose_prefix_image": ("IMAGE", {"tooltip": prefix}),
                "pose_cfg_scale": (
                    "FLOAT",
                    {"default": 1.5, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": cfg},
                ),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        pose_images: Tensor,
        strength: float,
        pose_prefix_image: Tensor | None = None,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        pose_cfg_scale: float | Sequence[float] = 1.5,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the poses, in the place of earlier ones. Raises ValueError for pictures of other sizes."""
        prefix = pose_images if pose_prefix_image is None else pose_prefix_image
        _check_size("pose_images", pose_images.shape[1:3], embeds, SIDE)
        _check_size("pose_prefix_image", prefix.shape[1:3], embeds, SIDE)
        parts = {
            "poses": to_video(pose_images)[None],
            "prefix": to_video(prefix[:1])[None],
            "pose_strength": strength,
            "pose_start": start_percent,
            "pose_end": end_percent,
            "cfg": per_step(pose_cfg_scale),
        }
        return (_with_parts(embeds, parts),)


class WanVideoAddOneToAllExtendEmbeds:
    """The same embeds for a video that goes on from an earlier one, and the poses of its part."""

    DISPLAY_NAME = "WanVideo Add OneToAll Extend Embeds"
    DESCRIPTION = "Goes on from the last frames of an earlier video, and cuts out the poses that come next."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "IMAGE")
    RETURN_NAMES = ("image_embeds", "pose_slice")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        window = {"default": 81, "min": 1, "max": 256, "step": 1}
        overlap = {"default": 5, "min": 0, "max": 64, "step": 1}
        done = {"default": 0, "min": 0, "max": 10000, "step": 1}
        rest = "Where pose_images end too early: repeat the last one, or stop"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The reference, and the size and length of this part"}),
                "prev_latents": ("LATENT", {"tooltip": "The last frames of the earlier video, encoded"}),
                "window_size": ("INT", {**window, "tooltip": "How many poses this part takes"}),
                "overlap": ("INT", {**overlap, "tooltip": "Frames that it has in common with the earlier video"}),
                "frames_processed": ("INT", {**done, "tooltip": "Frames of the video that are there already"}),
                "if_not_enough_frames": ([PAD, ERROR], {"default": PAD, "tooltip": rest}),
            },
            "optional": {"pose_images": ("IMAGE", {"tooltip": "Drawn poses of the whole video"})},
        }

    def add(
        self,
        embeds: ImageEmbeds,
        prev_latents: Latent,
        if_not_enough_frames: str,
        window_size: int = 81,
        overlap: int = 5,
        frames_processed: int = 0,
        pose_images: Tensor | None = None,
    ) -> tuple[ImageEmbeds, Tensor]:
        """Embeds and poses [window_size, H, W, 3]. Raises ValueError where there are too few of these."""
        given = TokenReplacement(prev_latents["samples"][:1].float(), embeds.leading_latents)
        others = tuple(modifier for modifier in embeds.modifiers if not isinstance(modifier, TokenReplacement))
        poses = torch.zeros(1, 64, 64, 3)
        if pose_images is not None:
            start = max(0, frames_processed - overlap)
            poses = _slice(pose_images[..., :3], start, start + window_size, pads=if_not_enough_frames == PAD)
        return replace(embeds, modifiers=(*others, given)), poses


def _with_parts(embeds: ImageEmbeds, parts: dict[str, object]) -> ImageEmbeds:
    """What the nodes before this one gave, with these parts of it."""
    mine = next((payload for payload in embeds.payloads if isinstance(payload, Animation)), Animation())
    others = tuple(payload for payload in embeds.payloads if not isinstance(payload, Animation))
    return replace(embeds, payloads=(*others, replace(mine, **parts)))


def _check_size(name: str, sides: Sequence[int], embeds: ImageEmbeds, factor: int) -> None:
    wanted = tuple(side * factor for side in embeds.latent_shape[2:])
    if tuple(sides) != wanted:
        raise ValueError(
            f"{name} is {sides[1]}x{sides[0]} but the video is {wanted[1]}x{wanted[0]}: resize it to the video's width "
            "and height."
        )


def _mask_video(mask: Tensor) -> Tensor:
    """The first mask as a grey frame [3, 1, H, W] in -1..1."""
    return to_video(mask.reshape(-1, *mask.shape[-2:])[:1, ..., None].expand(-1, -1, -1, 3))


def _slice(images: Tensor, start: int, end: int, *, pads: bool) -> Tensor:
    count = images.shape[0]
    if start >= count or (end > count and not pads):
        raise ValueError(
            f"This part needs the poses {start} to {end - 1} but pose_images has {count}: load more of the pose video, "
            "or make the video shorter."
        )
    return torch.cat((images[start:end], images[-1:].expand(max(end - count, 0), -1, -1, -1)))


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoAddOneToAllReferenceEmbeds, WanVideoAddOneToAllPoseEmbeds, WanVideoAddOneToAllExtendEmbeds
)
