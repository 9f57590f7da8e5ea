"""The node that makes CLIP features of pictures."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..node_tools import CATEGORY, OFFLOAD_TIP, Inputs, mappings
from .extension import ClipImage
from .tiles import tiled_features


class WanVideoClipVisionEncode:
    """CLIP features of one or two pictures, for image-to-video models."""

    DISPLAY_NAME = "WanVideo ClipVision Encode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_CLIPEMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                "clip_vision": ("CLIP_VISION", {"tooltip": "The CLIP ViT-H encoder that the model was trained with"}),
                "image_1": ("IMAGE", {"tooltip": "The start picture; a batch gives one row of features each"}),
                "strength_1": ("FLOAT", {**strength, "tooltip": "Weight of image_1's features"}),
                "strength_2": ("FLOAT", {**strength, "tooltip": "Weight of image_2's features"}),
                "crop": (["center", "disabled"], {"default": "center", "tooltip": "Cut the middle out, or squeeze"}),
                "combine_embeds": (
                    ["average", "sum", "concat", "batch"],
                    {"default": "average", "tooltip": "How the features of two pictures become one"},
                ),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
            },
            "optional": {
                "image_2": ("IMAGE", {"tooltip": "A second picture, such as the end of the video"}),
                "negative_image": ("IMAGE", {"tooltip": "For the pass without the prompt"}),
                "tiles": ("INT", {"default": 0, "min": 0, "max": 16, "step": 2, "tooltip": "Tiles a side; 0: none"}),
                "ratio": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Share of the whole picture beside its tiles",
                    },
                ),
            },
        }

    def process(
        self,
        clip_vision: object,
        image_1: Tensor,
        strength_1: float,
        strength_2: float,
        force_offload: bool,
        crop: str,
        combine_embeds: str,
        image_2: Tensor | None = None,
        negative_image: Tensor | None = None,
        tiles: int = 0,
        ratio: float = 1.0,
    ) -> tuple[ClipImage]:
        """Features of all pictures, weighted and combined."""

        def features(image: Tensor) -> Tensor:
            if tiles < 2:
                return clip_features(clip_vision, image, crop)
            encode = partial(clip_features, clip_vision, crop=crop)
            return tiled_features(encode, image, tiles, ratio, crop=crop == "center")

        images = [image_1] if image_2 is None else [image_1, image_2]
        rows = [row for image in images for row in features(image)]
        weights = [strength_1, strength_2, *(1.0 for _ in rows[2:])]
        weighted = [row[None] * weight for row, weight in zip(rows, weights, strict=False)]
        combine = {
            "average": lambda parts: torch.stack(parts).mean(dim=0),
            "sum": lambda parts: torch.stack(parts).sum(dim=0),
            "concat": lambda parts: torch.cat(parts, dim=1),
            "batch": lambda parts: torch.cat(parts, dim=0),
        }[combine_embeds]
        negative = None if negative_image is None else features(negative_image)[:1]
        if force_offload and hasattr(clip_vision, "managed"):
            clip_vision.managed.release()
        return (ClipImage(positive=combine(weighted), negative=negative),)


def clip_features(clip_vision: object, image: Tensor, crop: str) -> Tensor:
    """Features [n, 257, channels] of IMAGE, float32 on the CPU. crop: "center" cuts the middle out, else squeezed."""
    encoded = clip_vision.encode_image(image[..., :3], crop=crop == "center")
    return encoded.penultimate_hidden_states.float().cpu()


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoClipVisionEncode)
