"""The node of MiniMax-Remover."""

from __future__ import annotations

import torch

from ..node_tools import CATEGORY, VIDEO_SIZE, Inputs, Latent, mappings, round_size, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.request import ImageEmbeds
from .extension import MaskedVideo

VAE_SIDE_STRIDE = 8


class WanVideoMiniMaxRemoverEmbeds:
    """A video without what a mask covers."""

    DISPLAY_NAME = "WanVideo MiniMax Remover Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = "MiniMax-Remover: takes what the mask covers out of a video. For its model, with a cfg of 1."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        video = "The video, black where the mask is, encoded"
        return {
            "required": {
                **VIDEO_SIZE,
                "latents": ("LATENT", {"tooltip": video}),
                "mask_latents": ("LATENT", {"tooltip": "The mask as a video, white where things go, encoded"}),
            }
        }

    def process(
        self, num_frames: int, width: int, height: int, latents: Latent, mask_latents: Latent
    ) -> tuple[ImageEmbeds]:
        """Embeds of video and mask. Raises ValueError for latents that do not fit the size."""
        width, height = round_size(width, height)
        frames = whole_frames(num_frames)
        shape = (16, latent_frames(frames), height // VAE_SIDE_STRIDE, width // VAE_SIDE_STRIDE)
        parts = [latents["samples"][:1].float(), mask_latents["samples"][:1].float()]
        if any(part.shape[1:] != shape for part in parts):
            raise ValueError(
                f"latents are {tuple(parts[0].shape[1:])} and mask_latents {tuple(parts[1].shape[1:])}, but {frames} "
                f"frames of {width}x{height} are {shape} (channels, frames, height, width): encode both at this size "
                "and length."
            )
        video = MaskedVideo(torch.cat(parts, dim=1))
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=(video,)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoMiniMaxRemoverEmbeds)
