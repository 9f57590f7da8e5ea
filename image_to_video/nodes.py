"""Nodes that encode start and end pictures, and show what was encoded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..node_checks import Types, need_link, verdict
from ..node_tools import (
    CATEGORY,
    OFFLOAD_TIP,
    TILE_TIP,
    VIDEO_SIZE,
    Inputs,
    Latent,
    mappings,
    round_size,
    whole_frames,
)
from ..wanvideo.conditioning import Payload
from ..wanvideo.modules.vae import Tile, WanVAE
from ..wanvideo.request import ImageEmbeds, payloads_of
from .extension import AddedCondition, ImageCondition
from .pictures import GivenFrames, encode_given

NO_VAE = "Pictures are encoded by the VAE: connect WanVideoVAELoader to 'vae'."


class WanVideoImageToVideoEncode:
    """Encodes start and end pictures as the condition of an image-to-video model."""

    DISPLAY_NAME = "WanVideo ImageToVideo Encode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                **VIDEO_SIZE,
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength, "tooltip": "Noise on the pictures"}),
                "start_latent_strength": ("FLOAT", {"default": 1.0, **strength, "tooltip": "Below 1: more motion"}),
                "end_latent_strength": (
                    "FLOAT",
                    {"default": 1.0, **strength, "tooltip": "The same for the end picture"},
                ),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
            },
            "optional": {
                "vae": ("WANVAE", {"tooltip": "The VAE of the model; encodes the pictures"}),
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS", {"tooltip": "For Wan 2.1 models; 2.2 models use none"}),
                "start_image": ("IMAGE", {"tooltip": "The first frame, or the first frames"}),
                "end_image": ("IMAGE", {"tooltip": "The last frame, or the last frames"}),
                "control_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Of control models; not available"}),
                "fun_or_fl2v_model": ("BOOLEAN", {"default": True, "tooltip": "The end picture is the last frame"}),
                "temporal_mask": ("MASK", {"tooltip": "1 where a frame is given"}),
                "extra_latents": ("LATENT", {"tooltip": "Reference latents in front"}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "add_cond_latents": (
                    "ADD_COND_LATENTS",
                    {"advanced": True, "tooltip": "From WanVideo RealisDance Latents"},
                ),
                "augment_empty_frames": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": "More motion, experimental"},
                ),
                "empty_frame_pad_image": ("IMAGE", {"tooltip": "Instead of grey in frames that are not given"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Types | None = None) -> bool:
        """A VAE."""
        return verdict(cls, lambda: need_link(input_types, "vae", NO_VAE), input_types)

    def process(
        self,
        width: int,
        height: int,
        num_frames: int,
        force_offload: bool,
        noise_aug_strength: float,
        start_latent_strength: float,
        end_latent_strength: float,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        control_embeds: ImageEmbeds | None = None,
        fun_or_fl2v_model: bool = False,
        temporal_mask: Tensor | None = None,
        extra_latents: Latent | None = None,
        clip_embeds: Payload | None = None,
        tiled_vae: bool = False,
        add_cond_latents: AddedCondition | None = None,
        vae: WanVAE | None = None,
        augment_empty_frames: float = 0.0,
        empty_frame_pad_image: Tensor | None = None,
    ) -> tuple[ImageEmbeds]:
        """Condition latents, mask and CLIP features."""
        if vae is None:
            raise ValueError(NO_VAE)
        width, height = round_size(width, height, vae)
        reference = None if extra_latents is None else _reference(extra_latents, width, height, vae)
        given = GivenFrames(
            width=width,
            height=height,
            num_frames=whole_frames(num_frames),
            start=start_image,
            end=end_image,
            pad=empty_frame_pad_image,
            mask=temporal_mask,
            end_in_video=fun_or_fl2v_model or start_image is None,
            noise=noise_aug_strength,
            reference=reference,
            start_strength=start_latent_strength,
            end_strength=end_latent_strength,
            spread=augment_empty_frames,
        )
        cond, mask = encode_given(given, vae, tile=Tile() if tiled_vae else None)
        if add_cond_latents is not None:
            empty = vae.encode(torch.zeros(3, 1, height, width), quiet=True)
            add_cond_latents = replace(add_cond_latents, empty=empty[None])
        if force_offload:
            vae.managed.release()
        embeds = ImageEmbeds(
            latent_shape=tuple(cond.shape),
            num_frames=given.num_frames,
            payloads=payloads_of(ImageCondition(cond[None], mask[None]), clip_embeds, control_embeds, add_cond_latents),
            extra_end_frame=given.extra_end,
            leading_latents=0 if reference is None else reference.shape[1],
        )
        return (embeds,)


def _reference(latents: Latent, width: int, height: int, vae: WanVAE) -> Tensor:
    """[z, n, h, w] float32. Raises ValueError where they are not of a video of this size."""
    reference = latents["samples"][0].float()
    wanted = vae.latent_channels, height // vae.spatial_factor, width // vae.spatial_factor
    if (reference.shape[0], *reference.shape[2:]) != wanted:
        raise ValueError(
            f"extra_latents are {tuple(reference.shape)} (channels, frames, height, width) but the video's have "
            f"{wanted[0]} channels of {wanted[1]}x{wanted[2]}: encode them at {width}x{height} with the same VAE."
        )
    return reference


class WanVideoPreviewEmbeds:
    """The encoded pictures of image embeds, and where they are."""

    DISPLAY_NAME = "WanVideo Preview Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "get"
    RETURN_TYPES = ("LATENT", "MASK")
    RETURN_NAMES = ("image_embeds", "mask")
    DESCRIPTION = "What an image-to-video model is given: WanVideo Decode shows the latents, a mask preview the frames."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "From WanVideo ImageToVideo Encode, or another node that gives pictures to an image-to-video model"
        return {"required": {"embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": tip})}}

    def get(self, embeds: ImageEmbeds) -> tuple[Latent, Tensor]:
        """Condition latents [1, C, F, h, w], and of each latent frame the mask of its first pixel frame [F, h, w]."""
        condition = next((part for part in embeds.payloads if isinstance(part, ImageCondition)), None)
        if condition is None:
            raise ValueError(
                "These image embeds hold no encoded pictures of an image-to-video model: connect WanVideo ImageToVideo "
                "Encode."
            )
        return {"samples": condition.cond.float()}, condition.mask[0, 0].float()


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoImageToVideoEncode, WanVideoPreviewEmbeds)
