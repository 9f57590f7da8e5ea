"""Smaller nodes of VideoHelperSuite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...node_tools import Inputs
from .scaling import METHODS, scaled_to

SOURCE, LOADED = "source", "loaded"
# What VHS_LoadVideo tells of the file and of what it made of it, and the types.
DETAILS = {"fps": "FLOAT", "frame_count": "INT", "duration": "FLOAT", "width": "INT", "height": "INT"}


def video_info(*sides: str) -> type:
    """A node class for rate, frames, seconds, width and height of a video, as it is and as it was loaded."""

    class VideoInfo:
        FUNCTION = "get_video_info"
        RETURN_TYPES = tuple(DETAILS.values()) * len(sides)

        @classmethod
        def INPUT_TYPES(cls) -> Inputs:
            return {"required": {"video_info": ("VHS_VIDEOINFO",)}}

        def get_video_info(self, video_info: Mapping[str, float]) -> tuple[float, ...]:
            """Five numbers a side."""
            return tuple(video_info[f"{side}_{name}"] for side in sides for name in DETAILS)

    return VideoInfo


class DuplicateImages:
    """The whole batch, several times."""

    FUNCTION = "duplicate_input"
    RETURN_TYPES = ("IMAGE", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"images": ("IMAGE",), "multiply_by": ("INT", {"default": 1, "min": 1})}}

    def duplicate_input(self, images: Tensor, multiply_by: int) -> tuple[Tensor, int]:
        """[n * multiply_by, H, W, C], and how many those are."""
        return images.repeat(multiply_by, 1, 1, 1), len(images) * multiply_by


class MergeImages:
    """Two batches one after the other, at the size of one of them."""

    FUNCTION = "merge"
    RETURN_TYPES = ("IMAGE", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "images_A": ("IMAGE",),
                "images_B": ("IMAGE",),
                "merge_strategy": (["match A", "match B", "match smaller", "match larger"],),
                "scale_method": (METHODS,),
                "crop": (["disabled", "center"],),
            }
        }

    def merge(
        self, images_A: Tensor, images_B: Tensor, merge_strategy: str, scale_method: str, crop: str  # noqa: N803
    ) -> tuple[Tensor, int]:
        """All pictures, and how many those are. Smaller and larger is meant by the number of pixels."""
        smaller, larger = sorted((images_A, images_B), key=lambda images: images[0].numel())
        chosen = {"match A": images_A, "match B": images_B, "match smaller": smaller, "match larger": larger}
        height, width = chosen[merge_strategy].shape[1:3]
        parts = [
            images if images.shape[1:3] == (height, width) else scaled_to(images, scale_method, width, height, crop)
            for images in (images_A, images_B)
        ]
        return torch.cat(parts), sum(map(len, parts))


NODE_CLASS_MAPPINGS = {
    "VHS_MergeImages": MergeImages,
    "VHS_VideoInfo": video_info(SOURCE, LOADED),
    "VHS_VideoInfoSource": video_info(SOURCE),
    "VHS_VideoInfoLoaded": video_info(LOADED),
    "VHS_DuplicateImages": DuplicateImages,
}
