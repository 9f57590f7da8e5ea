"""The node that makes references for Phantom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..node_tools import CATEGORY, Inputs, Latent, mappings, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.guidance import per_step
from ..wanvideo.request import ImageEmbeds, payloads_of
from .extension import SubjectReferences

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoPhantomEmbeds:
    """A video of up to four subjects, whose encoded pictures the Phantom model keeps alike."""

    DISPLAY_NAME = "WanVideo Phantom Embeds"
    DESCRIPTION = "Pictures of subjects for the Phantom model. The video takes its width and height from them."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        subject = {"tooltip": "Another encoded picture of a subject, of the same size"}
        return {
            "required": {
                "num_frames": (
                    "INT",
                    {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": "Frames of the video"},
                ),
                "phantom_latent_1": (
                    "LATENT",
                    {"tooltip": "Encoded picture of a subject (WanVideoEncode), at the size of the video"},
                ),
                "phantom_cfg_scale": (
                    "FLOAT",
                    {
                        "default": 5.0,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "Guidance by the subjects, beside the cfg of the sampler: a third pass of the "
                        "model. 1, or a cfg of 1 in the sampler, saves it. A list gives one value a step",
                    },
                ),
                "phantom_start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the subjects are there"},
                ),
                "phantom_end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the subjects are there"},
                ),
            },
            "optional": {
                "phantom_latent_2": ("LATENT", subject),
                "phantom_latent_3": ("LATENT", subject),
                "phantom_latent_4": ("LATENT", subject),
                "vace_embeds": (
                    "WANVIDIMAGE_EMBEDS",
                    {"tooltip": "VACE control of the same video: same width, height and frames"},
                ),
            },
        }

    def process(
        self,
        num_frames: int,
        phantom_cfg_scale: float | Sequence[float],
        phantom_start_percent: float,
        phantom_end_percent: float,
        phantom_latent_1: Latent,
        phantom_latent_2: Latent | None = None,
        phantom_latent_3: Latent | None = None,
        phantom_latent_4: Latent | None = None,
        vace_embeds: ImageEmbeds | None = None,
    ) -> tuple[ImageEmbeds]:
        """References, and the size of the video that goes with them."""
        given = (phantom_latent_1, phantom_latent_2, phantom_latent_3, phantom_latent_4)
        pictures = [latent["samples"][0].float() for latent in given if latent is not None]
        if len({(picture.shape[0], *picture.shape[2:]) for picture in pictures}) > 1:
            raise ValueError(
                f"The Phantom latents have different sizes ({', '.join(str(tuple(p.shape)) for p in pictures)}): "
                "resize all pictures to the width and height of the video before they are encoded."
            )
        references = torch.cat(pictures, dim=1)[None]
        frames = whole_frames(num_frames)
        shape = (references.shape[1], latent_frames(frames), *references.shape[3:])
        leading = trailing = 0
        if vace_embeds is not None:
            leading, trailing = vace_embeds.leading_latents, vace_embeds.trailing_latents
            shape = (shape[0], shape[1] + leading + trailing, *shape[2:])
            if tuple(vace_embeds.latent_shape) != shape:
                raise ValueError(
                    f"vace_embeds are for latents {tuple(vace_embeds.latent_shape)} but Phantom's video has {shape}: "
                    "give both the same width, height and num_frames."
                )
        subjects = SubjectReferences(
            references, per_step(phantom_cfg_scale), phantom_start_percent, phantom_end_percent
        )
        embeds = ImageEmbeds(
            latent_shape=shape,
            num_frames=frames,
            payloads=payloads_of(subjects, vace_embeds),
            leading_latents=leading,
            trailing_latents=trailing,
        )
        return (embeds,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoPhantomEmbeds)
