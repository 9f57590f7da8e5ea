"""The node of StoryMem."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .extension import MemoryPositions, WithoutMemory, with_memory


class WanVideoAddStoryMemLatents:
    """Pictures of earlier shots that the video keeps to."""

    DISPLAY_NAME = "WanVideo Add StoryMem Latents"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "StoryMem: keyframes of earlier shots come in front of the video, which keeps to them. For image-to-video "
        "models with the StoryMem LoRA."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        negative = "Tells the model that memory lies before the video in time; off: the video follows at once"
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "The VAE that the start picture was encoded with"}),
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "From WanVideo ImageToVideo Encode"}),
                "memory_images": ("IMAGE", {"tooltip": "Keyframes of earlier shots, the oldest first"}),
                "rope_negative_offset": ("BOOLEAN", {"default": False, "tooltip": negative}),
                "rope_negative_offset_frames": (
                    "INT",
                    {"default": 5, "min": 0, "max": 100, "step": 1, "tooltip": "Latent frames between two memories"},
                ),
            }
        }

    def add(
        self,
        vae: WanVAE,
        embeds: ImageEmbeds,
        memory_images: Tensor,
        rope_negative_offset: bool,
        rope_negative_offset_frames: int,
    ) -> tuple[ImageEmbeds]:
        """The embeds with memory in front. Raises ValueError for embeds without a start picture."""
        channels, frames, height, width = embeds.latent_shape
        size = (width * vae.spatial_factor, height * vae.spatial_factor)
        pictures = [to_video(image[None], *size) for image in memory_images]
        payloads = with_memory(embeds.payloads, torch.cat([vae.encode(p, quiet=True) for p in pictures], dim=1))
        vae.managed.release()
        count = len(pictures)
        if rope_negative_offset and rope_negative_offset_frames:
            payloads = (*payloads, MemoryPositions(count, rope_negative_offset_frames))
        remembering = replace(
            embeds,
            latent_shape=(channels, frames + count, height, width),
            payloads=payloads,
            leading_latents=embeds.leading_latents + count,
            modifiers=(*embeds.modifiers, WithoutMemory(count)),
        )
        return (remembering,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddStoryMemLatents)
