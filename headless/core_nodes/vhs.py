"""Smaller nodes of VideoHelperSuite."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...node_tools import Inputs

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


NODE_CLASS_MAPPINGS = {
    "VHS_VideoInfo": video_info(SOURCE, LOADED),
    "VHS_VideoInfoSource": video_info(SOURCE),
    "VHS_VideoInfoLoaded": video_info(LOADED),
    "VHS_DuplicateImages": DuplicateImages,
}
