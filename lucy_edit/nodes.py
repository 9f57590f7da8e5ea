"""Lucy Edit: a model that is told in words how to change a video reads the video in channels beside the noise.

Source: DecartAI/Lucy-Edit-ComfyUI; diffusers (LucyEditPipeline). The channels are those of a control video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..fun_control.extension import ControlSignal
from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.request import ImageEmbeds


@dataclass(frozen=True)
class EditedVideo(ControlSignal):
    """video [1, C, F, H, W]: latents of the video that is to be changed."""

    needs: ClassVar[str] = (
        "This model has no channels for a video to edit: load Lucy Edit (its patch_embedding.weight reads 96 "
        "channels), or disconnect WanVideoAddLucyEditLatents."
    )


class WanVideoAddLucyEditLatents:
    """The video that Lucy Edit changes."""

    DISPLAY_NAME = "WanVideo Add LucyEdit Latents"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = "Lucy Edit: the video that is to be changed as the prompt says. For the Lucy Edit model."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        video = "The video, encoded with the Wan 2.2 VAE at the size and length of the embeds"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the video"}),
                "extra_latents": ("LATENT", {"tooltip": video}),
            }
        }

    def add(self, embeds: ImageEmbeds, extra_latents: Latent) -> tuple[ImageEmbeds]:
        """The embeds with the video. Raises ValueError where they have a control video already."""
        if any(isinstance(payload, ControlSignal) for payload in embeds.payloads):
            raise ValueError("The image embeds have a control video or one to edit already: connect only one.")
        video = EditedVideo(extra_latents["samples"][:1].float())
        return (replace(embeds, payloads=(*embeds.payloads, video)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddLucyEditLatents)
