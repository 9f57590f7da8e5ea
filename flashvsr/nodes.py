"""The nodes of FlashVSR: the video that it restores, and its decoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..host import get_host
from ..node_checks import Types, check_loadable, verdict
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.images import to_video
from ..wanvideo.request import ImageEmbeds
from .decoder import LOADER, FlashVsrVAE, load_decoder
from .extension import LowQuality


class WanVideoAddFlashVSRInput:
    """The same embeds with a video that FlashVSR restores."""

    DISPLAY_NAME = "WanVideo Add FlashVSR Input"
    DESCRIPTION = "The video that FlashVSR restores, enlarged to the size of the result."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.01}
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the result (WanVideoEmptyEmbeds)"}),
                "images": ("IMAGE", {"tooltip": "The frames to restore, enlarged to that size"}),
                "strength": ("FLOAT", {**strength, "tooltip": "How strongly they steer the result"}),
            }
        }

    def add(self, embeds: ImageEmbeds, images: Tensor, strength: float) -> tuple[ImageEmbeds]:
        """Embeds with the frames, in the place of earlier ones; those beyond the video's length are left out.

        Raises ValueError if there are fewer than the video has.
        """
        count = embeds.num_frames
        if images.shape[0] < count:
            raise ValueError(
                f"The FlashVSR images are {images.shape[0]} but the video has {count} frames: lower num_frames."
            )
        video = to_video(images[:count])
        frames = torch.cat((video, video[:, -1:].expand(-1, VAE_TIME_STRIDE - 1, -1, -1)), dim=1)[None]
        others = tuple(payload for payload in embeds.payloads if not isinstance(payload, LowQuality))
        return (replace(embeds, payloads=(*others, LowQuality(frames, torch.tensor(strength)))),)


class WanVideoFlashVSRDecoderLoader:
    """Loads FlashVSR's decoder from models/vae."""

    DISPLAY_NAME = LOADER
    DESCRIPTION = (
        "FlashVSR's own decoder, small and fast, which sees the video of low quality beside the latents. It decodes "
        "what a sampler made with WanVideoAddFlashVSRInput."
    )
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVAE",)
    RETURN_NAMES = ("vae",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        precision = {"default": "bf16", "tooltip": "What it computes in"}
        return {
            "required": {"model_name": (files("vae"), {"tooltip": "FlashVSR's TC decoder in models/vae"})},
            "optional": {"precision": (["fp16", "fp32", "bf16"], precision)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """The decoder, by its header."""

        def check(model_name: str) -> None:
            check_loadable(get_host().find_file("vae", model_name), cls.DISPLAY_NAME)

        return verdict(cls, check, input_types, model_name=model_name)

    def loadmodel(self, model_name: str, precision: str = "bf16") -> tuple[FlashVsrVAE]:
        """Load it."""
        host = get_host()
        return (load_decoder(host.find_file("vae", model_name), dtype=DTYPES[precision], host=host),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddFlashVSRInput, WanVideoFlashVSRDecoderLoader)
