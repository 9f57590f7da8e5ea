"""Nodes that prepare pictures: their size, their number, their background."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from .host import get_host
from .node_tools import CATEGORY, SIZE_STEP, Inputs, mappings
from .wanvideo.images import centered, closest_size, resize_images

log = logging.getLogger("wanvideo")

KEEP, CROP = "keep_input", "crop_to_new"


class WanVideoImageResizeToClosest:
    """Resizes pictures to a size that models can run, of about as many pixels as asked for."""

    DISPLAY_NAME = "WanVideo Image Resize To Closest"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("IMAGE", "INT", "INT")
    RETURN_NAMES = ("image", "width", "height")
    DESCRIPTION = (
        "Resizes pictures to the largest size that has no more pixels than width x height and sides of whole tokens "
        "(multiples of 16), as Wan's own image-to-video code does."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"min": 64, "max": 8096, "step": 8}
        ratio = "keep_input: the picture's own; stretch_to_new: squeezed to width : height; crop_to_new: cut to it"
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "Pictures of one size"}),
                "generation_width": ("INT", {"default": 832, **side, "tooltip": "With the height: how many pixels"}),
                "generation_height": ("INT", {"default": 480, **side, "tooltip": "With the width: how many pixels"}),
                "aspect_ratio_preservation": ([KEEP, "stretch_to_new", CROP], {"tooltip": ratio}),
            }
        }

    def process(
        self, image: Tensor, generation_width: int, generation_height: int, aspect_ratio_preservation: str
    ) -> tuple[Tensor, int, int]:
        """The pictures and their size."""
        asked = (generation_height, generation_width)
        rows, columns = image.shape[1:3] if aspect_ratio_preservation == KEEP else asked
        width, height = closest_size(rows / columns, generation_width * generation_height, SIZE_STEP)
        part = centered(image, width, height) if aspect_ratio_preservation == CROP else image
        return resize_images(part, width, height), width, height


class ExtractStartFramesForContinuations:
    """The first frames of a video."""

    DISPLAY_NAME = "Extract Start Frames For Continuations"
    CATEGORY = CATEGORY
    FUNCTION = "get_start_frames"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("start_frames",)
    DESCRIPTION = "The first frames of a video, for one that is to begin with them."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        count = {"default": 10, "min": 1, "max": 1024, "step": 1, "tooltip": "How many; all of a shorter video"}
        return {
            "required": {
                "input_video_frames": ("IMAGE", {"tooltip": "Frames of a video"}),
                "num_frames": ("INT", count),
            }
        }

    def get_start_frames(self, input_video_frames: Tensor, num_frames: int) -> tuple[Tensor]:
        """IMAGE, float32 on the CPU."""
        if len(input_video_frames) < num_frames:
            log.warning("%d frames are asked for, and all %d of the video taken.", num_frames, len(input_video_frames))
        return (input_video_frames[:num_frames].cpu().float(),)


class DrawGaussianNoiseOnImage:
    """Noise in the colors of the subject, where the mask is not 1."""

    DISPLAY_NAME = "Draw Gaussian Noise On Image"
    CATEGORY = "KJNodes/masking"
    FUNCTION = "apply"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    DESCRIPTION = (
        "Fills the background, where the mask is 0, with Gaussian noise that has the mean and the deviation of the "
        "subject in each color."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        seed = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "The same seed gives the same noise"}
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "Pictures with a subject"}),
                "mask": ("MASK", {"tooltip": "1 on the subject; masks start over where they are fewer than pictures"}),
            },
            "optional": {
                "device": (["cpu", "gpu"], {"default": "cpu", "tooltip": "Noise of the two differs for a seed"}),
                "seed": ("INT", seed),
            },
        }

    def apply(self, image: Tensor, mask: Tensor, device: str = "cpu", seed: int = 0) -> tuple[Tensor]:
        """IMAGE on the CPU; black behind a picture whose mask has no subject."""
        place = get_host().device() if device == "gpu" else torch.device("cpu")
        pictures, masks = image.to(place), mask.to(place)
        if masks.shape[1:] != pictures.shape[1:3]:
            masks = functional.interpolate(masks[:, None], size=pictures.shape[1:3], mode="nearest-exact")[:, 0]
        generator = torch.Generator(device=place).manual_seed(seed)
        drawn = torch.empty_like(pictures)
        for index, picture in enumerate(pictures):
            subject = masks[index % len(masks)]
            noise = _like_subject(picture, subject > 0.5, generator)
            drawn[index] = picture * subject[..., None] + noise * (1 - subject[..., None])
        return (drawn.cpu(),)


def _like_subject(picture: Tensor, subject: Tensor, generator: torch.Generator) -> Tensor:
    """Noise [H, W, C] in 0..1 with each channel's mean and deviation inside `subject`, a boolean mask; else black."""
    if not subject.any():
        log.warning("A mask has no subject, so that its picture has a black background.")
        return torch.zeros_like(picture)
    channels = []
    for channel in picture.unbind(-1):
        pixels = channel[subject]
        # One pixel has no deviation.
        deviation = float(pixels.std()) if len(pixels) > 1 else 0.0
        # Each channel is drawn on its own: a seed gives other noise in memory that is not contiguous.
        drawn = torch.empty(subject.shape, dtype=picture.dtype, device=picture.device)
        channels.append(drawn.normal_(float(pixels.mean()), deviation, generator=generator))
    return torch.stack(channels, dim=-1).clamp_(0, 1)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoImageResizeToClosest, ExtractStartFramesForContinuations, DrawGaussianNoiseOnImage
)
