"""The node of time-to-move."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.config import CHANNELS_2_2
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.request import ImageEmbeds
from .reference import TimeToMove


class WanVideoAddTTMLatents:
    """Lets a crude video lead the motion of the first steps."""

    DISPLAY_NAME = "WanVideo Add TTMLatents"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "Time-to-move: a crude video, as of a part that is cut out and dragged, leads the motion. Sampling begins from "
        "it, and in the mask it is followed for more steps."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        end = "Step from which on the mask is free, too"
        start = "Step from which on the whole video is sampled; higher keeps more of the reference"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Of the video's first picture"}),
                "reference_latents": ("LATENT", {"tooltip": "The crude video, encoded, of the same size and length"}),
                "mask": ("MASK", {"tooltip": "1 where the crude video leads, for every frame of the video"}),
                "start_step": ("INT", {"default": 0, "min": -1, "max": 1000, "step": 1, "tooltip": start}),
                "end_step": ("INT", {"default": 1, "min": 1, "max": 1000, "step": 1, "tooltip": end}),
            }
        }  # fmt: skip

    def add(
        self, embeds: ImageEmbeds, reference_latents: Latent, mask: Tensor, start_step: int, end_step: int
    ) -> tuple[ImageEmbeds]:
        """The embeds with this reference alone. Raises ValueError for steps in the wrong order."""
        if end_step <= start_step:
            raise ValueError(f"TTM's end_step ({end_step}) must come after start_step ({start_step}).")
        reference = reference_latents["samples"][0].float()
        factor = 16 if reference.shape[0] == CHANNELS_2_2 else 8
        sides = tuple(max(side // factor, 1) for side in mask.shape[1:])
        small = functional.interpolate(mask[None, ::VAE_TIME_STRIDE].float(), size=sides, mode="nearest")
        motion = TimeToMove(reference, small, start_step, end_step)
        others = tuple(modifier for modifier in embeds.modifiers if not isinstance(modifier, TimeToMove))
        return (replace(embeds, modifiers=(*others, motion)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddTTMLatents)
