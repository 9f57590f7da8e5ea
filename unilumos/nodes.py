"""The node of UniLumos."""

from __future__ import annotations

import torch

from ..node_tools import CATEGORY, VIDEO_SIZE, Inputs, Latent, mappings, round_size, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.request import ImageEmbeds
from .extension import RelitVideo

LATENT_CHANNELS = 16
VAE_SIDE_STRIDE = 8


class WanVideoUniLumosEmbeds:
    """A video whose foreground UniLumos lights anew."""

    DISPLAY_NAME = "WanVideo UniLumos Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = "UniLumos: lights a foreground as the prompt says, or to suit a background. For its model."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        foreground = "The video, gray (127) where the background will be, encoded; without it the prompt invents one"
        background = "The video behind it, encoded; without it the prompt invents one"
        return {
            "required": {
                **VIDEO_SIZE,
            },
            "optional": {
                "foreground_latents": ("LATENT", {"tooltip": foreground}),
                "background_latents": ("LATENT", {"tooltip": background}),
            },
        }

    def process(
        self,
        num_frames: int,
        width: int,
        height: int,
        foreground_latents: Latent | None = None,
        background_latents: Latent | None = None,
    ) -> tuple[ImageEmbeds]:
        """Embeds of both videos. Raises ValueError for latents that do not fit the size."""
        width, height = round_size(width, height)
        frames = whole_frames(num_frames)
        shape = (LATENT_CHANNELS, latent_frames(frames), height // VAE_SIDE_STRIDE, width // VAE_SIDE_STRIDE)
        videos = []
        for name, given in (("foreground_latents", foreground_latents), ("background_latents", background_latents)):
            latents = torch.zeros(1, *shape) if given is None else given["samples"][:1].float()
            if latents.shape[1:] != shape:
                raise ValueError(
                    f"{name} are {tuple(latents.shape[1:])}, but {frames} frames of {width}x{height} are {shape} "
                    "(channels, frames, height, width): encode the video at this size and length."
                )
            videos.append(latents)
        relit = RelitVideo(torch.cat(videos, dim=1))
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=(relit,)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoUniLumosEmbeds)
