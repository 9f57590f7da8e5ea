"""Nodes that the original keeps for old graphs only."""

from __future__ import annotations

import torch
from torch import Tensor

from .clip_image.extension import ClipImage
from .clip_image.nodes import clip_features
from .image_to_video.extension import ImageCondition
from .image_to_video.pictures import fold_mask, noised
from .node_tools import CATEGORY, FRAMES_TIP, OFFLOAD_TIP, SIZE_STEP, Inputs, mappings, round_size, whole_frames
from .wanvideo.images import closest_size, to_video
from .wanvideo.modules.vae import WanVAE
from .wanvideo.request import ImageEmbeds


class WanVideoImageClipEncode:
    """Start picture and CLIP features of a Wan 2.1 image-to-video model in one node."""

    DISPLAY_NAME = "WanVideo ImageClip Encode (Deprecated)"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DEPRECATED = True
    DESCRIPTION = (
        "Encodes the start picture for a Wan 2.1 image-to-video model. New graphs use WanVideo ClipVision Encode and "
        "WanVideo ImageToVideo Encode."
    )
    RENAMED_INPUTS = {"clip": "clip_vision"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 64, "max": 8096, "step": 8}
        strength = {"min": 0.0, "max": 10.0, "step": 0.001}
        adjust = "As many pixels as width x height at the picture's own proportions; off: that very size"
        return {
            "required": {
                "clip_vision": ("CLIP_VISION", {"tooltip": "The CLIP ViT-H encoder that the model was trained with"}),
                "image": ("IMAGE", {"tooltip": "The start picture"}),
                "vae": ("WANVAE", {"tooltip": "The VAE of the model; encodes the picture"}),
                "generation_width": ("INT", {"default": 832, **size, "tooltip": "In pixels"}),
                "generation_height": ("INT", {"default": 480, **size, "tooltip": "In pixels"}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": FRAMES_TIP}),
            },
            "optional": {
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength, "tooltip": "Noise on the picture"}),
                "latent_strength": ("FLOAT", {"default": 1.0, **strength, "tooltip": "Factor on the picture"}),
                "clip_embed_strength": ("FLOAT", {"default": 1.0, **strength, "tooltip": "Factor on its features"}),
                "adjust_resolution": ("BOOLEAN", {"default": True, "tooltip": adjust}),
            },
        }

    def process(
        self,
        clip_vision: object,
        vae: WanVAE,
        image: Tensor,
        num_frames: int,
        generation_width: int,
        generation_height: int,
        force_offload: bool = True,
        noise_aug_strength: float = 0.0,
        latent_strength: float = 1.0,
        clip_embed_strength: float = 1.0,
        adjust_resolution: bool = True,
    ) -> tuple[ImageEmbeds]:
        """Condition latents, mask and CLIP features. Raises ValueError for more than one picture."""
        if len(image) != 1:
            raise ValueError(
                f"'{self.DISPLAY_NAME}' takes one start picture but got {len(image)}: give one, or use WanVideo "
                "ImageToVideo Encode, which takes several."
            )
        features = clip_features(clip_vision, image, "center") * clip_embed_strength
        if force_offload and hasattr(clip_vision, "managed"):
            clip_vision.managed.release()
        if adjust_resolution:
            area = generation_width * generation_height
            width, height = closest_size(image.shape[1] / image.shape[2], area, SIZE_STEP)
        else:
            width, height = round_size(generation_width, generation_height, vae)
        frames = whole_frames(num_frames)
        video = torch.zeros(3, frames, height, width)
        video[:, :1] = noised(to_video(image, width, height), noise_aug_strength) * latent_strength
        cond = vae.encode(video)
        vae.managed.release()
        given = torch.zeros(frames, *cond.shape[2:])
        given[0] = 1
        payloads = (ImageCondition(cond[None], fold_mask(given)[None]), ClipImage(features))
        return (ImageEmbeds(latent_shape=tuple(cond.shape), num_frames=frames, payloads=payloads),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoImageClipEncode)
