"""Stable Video Infinity (SVI) 2 Pro: a video goes on from the last one and keeps to an anchor picture.

Source: vita-epfl/Stable-Video-Infinity. A LoRA on an image-to-video model reads the condition that is made here.
"""

from __future__ import annotations

import torch

from ..image_to_video.extension import ImageCondition
from ..image_to_video.pictures import fold_mask
from ..node_tools import CATEGORY, FRAMES_TIP, Inputs, Latent, mappings, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.request import ImageEmbeds


class WanVideoSVIProEmbeds:
    """A condition of an anchor picture and the last latents of the video before."""

    DISPLAY_NAME = "WanVideo SVIPro Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "Stable Video Infinity 2 Pro: the next part of a long video goes on from the last latents of the one before, "
        "and keeps to an anchor picture. For image-to-video models with the SVI LoRA."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        count = {"default": 1, "min": 0, "max": 100, "step": 1}
        return {
            "required": {
                "anchor_samples": ("LATENT", {"tooltip": "The first picture of the whole video, encoded"}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": FRAMES_TIP}),
            },
            "optional": {
                "prev_samples": ("LATENT", {"tooltip": "Latents of the part before; none for the first part"}),
                "motion_latent_count": (
                    "INT",
                    {**count, "tooltip": "How many of its last latents the part goes on from"},
                ),
            },
        }

    def add(
        self,
        anchor_samples: Latent,
        num_frames: int,
        prev_samples: Latent | None = None,
        motion_latent_count: int = 1,
    ) -> tuple[ImageEmbeds]:
        """Embeds of anchor, motion and zeros. Raises ValueError where these do not fit one another or the length."""
        anchor, frames = anchor_samples["samples"][0].float(), whole_frames(num_frames)
        parts = [anchor]
        if prev_samples is not None and motion_latent_count:
            parts.append(prev_samples["samples"][0].float()[:, -motion_latent_count:])
        sizes = {(part.shape[0], *part.shape[2:]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(
                f"anchor_samples are {tuple(anchor.shape)} and prev_samples {tuple(parts[1].shape)} (channels, frames, "
                "height, width): encode the anchor at the width and height of the video before."
            )
        known, total = sum(part.shape[1] for part in parts), latent_frames(frames)
        if known > total:
            raise ValueError(
                f"Anchor and motion are {known} latent frames, but {frames} frames of video are {total}: raise "
                "num_frames, or lower motion_latent_count."
            )
        height, width = anchor.shape[2:]
        cond = torch.cat((*parts, anchor.new_zeros(anchor.shape[0], total - known, height, width)), dim=1)
        given = torch.zeros(frames, height, width)
        given[0] = 1
        picture = ImageCondition(cond[None], fold_mask(given)[None])
        return (ImageEmbeds(latent_shape=tuple(cond.shape), num_frames=frames, payloads=(picture,)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoSVIProEmbeds)
