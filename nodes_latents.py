"""Nodes that hand latents on: from ComfyUI's nodes and to them, and into a run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .node_tools import CATEGORY, Inputs, Latent, mappings
from .wanvideo.modules.vae import MEAN_21, MEAN_22, STD_21, STD_22
from .wanvideo.request import ImageEmbeds

STATISTICS = {len(mean): (mean, deviation) for mean, deviation in ((MEAN_21, STD_21), (MEAN_22, STD_22))}


class WanVideoAddExtraLatent:
    """Gives latents of a video before sampling, at any place of it."""

    DISPLAY_NAME = "WanVideo Add Extra Latent"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "Puts encoded frames at a place of the video that is to be sampled: pictures of the 5B model, and frames that "
        "Pusa goes on from. Several nodes in a row give several places."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        index = "Place of the first one among the video's latent frames, each 4 frames; negative counts from the end"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the video"}),
                "extra_latents": ("LATENT", {"tooltip": "Encoded frames of the same size, from WanVideo Encode"}),
                "latent_index": ("INT", {"default": 0, "min": -1000, "max": 1000, "step": 1, "tooltip": index}),
            }
        }

    def add(self, embeds: ImageEmbeds, extra_latents: Latent, latent_index: int) -> tuple[ImageEmbeds]:
        """Embeds with one more pair of place and latents, behind those that they had."""
        given = (latent_index, extra_latents["samples"][0].float())
        return (replace(embeds, given_latents=(*embeds.given_latents, given)),)


class WanVideoLatentReScale:
    """Turns latents of ComfyUI's VAE into those of this pack's, and back."""

    DISPLAY_NAME = "WanVideo Latent ReScale"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = (
        "Latents of this pack are normalized per channel, those of ComfyUI's own VAE and sampler nodes are not; this "
        "node converts them, so that both can be mixed in one graph."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "comfy_to_wrapper: for nodes of this pack; wrapper_to_comfy: for ComfyUI's own nodes"
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "Of a Wan 2.1 VAE (16 channels) or a Wan 2.2 VAE (48)"}),
                "direction": (["comfy_to_wrapper", "wrapper_to_comfy"], {"tooltip": tip}),
            }
        }

    def encode(self, samples: Latent, direction: str) -> tuple[Latent]:
        """The LATENT with other samples. Raises ValueError for latents of another VAE."""
        latents: Tensor = samples["samples"]
        channels = latents.shape[1]
        if latents.ndim != 5 or channels not in STATISTICS:
            raise ValueError(
                f"The samples are {tuple(latents.shape)}, but those of a Wan video are [n, channels, frames, height, "
                f"width] with {' or '.join(map(str, STATISTICS))} channels: connect latents of a Wan VAE."
            )
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in STATISTICS[channels])
        back = direction == "wrapper_to_comfy"
        return ({**samples, "samples": latents * deviation + mean if back else (latents - mean) / deviation},)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddExtraLatent, WanVideoLatentReScale)
