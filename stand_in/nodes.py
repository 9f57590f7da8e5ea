"""The node that gives the picture of a face to Stand-In."""

from __future__ import annotations

from dataclasses import replace

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.request import ImageEmbeds
from .extension import FaceReference


class WanVideoAddStandInLatent:
    """Adds the encoded picture of a face to a text-to-video run with Stand-In's LoRA."""

    DISPLAY_NAME = "WanVideo Add StandIn Latent"
    DESCRIPTION = (
        "A face that the video keeps. Needs Stand-In's LoRA at the 'lora' input of the model loader; face the camera, "
        "on a white background."
    )
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The video to come, from WanVideo Empty Embeds"}),
                "ip_image_latent": (
                    "LATENT",
                    {"tooltip": "The picture of the face, encoded (WanVideoEncode); it was trained with 512x512"},
                ),
                "freq_offset": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": 100,
                        "step": 1,
                        "tooltip": "How many more frames before the video the reference stands; 0 is as trained",
                    },
                ),
            }
        }

    def add(self, embeds: ImageEmbeds, ip_image_latent: Latent, freq_offset: int) -> tuple[ImageEmbeds]:
        """The embeds with the reference."""
        face = FaceReference(ip_image_latent["samples"][:1].float(), freq_offset)
        return (replace(embeds, payloads=(*embeds.payloads, face)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddStandInLatent)
