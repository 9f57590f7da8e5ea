"""The node of looping videos."""

from __future__ import annotations

from ..node_tools import CATEGORY, Inputs, mappings
from .shift import LatentShift


class WanVideoLoopArgs:
    """Makes the end of the video lead into its start."""

    DISPLAY_NAME = "WanVideo Loop Args"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("LOOPARGS",)
    RETURN_NAMES = ("loop_args",)
    DESCRIPTION = (
        "Makes videos that loop, as Mobius does (https://github.com/YisuiTT/Mobius/): the frames that the model sees "
        "begin at another place in every step, so that no place is the start or the end. For text to video."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        skip = "Latent frames by which the start moves on after every step; one is four frames of video"
        start = "Part of the steps before which the frames stay in their places"
        end = "Part of the steps after which they stay in their places again"
        return {
            "required": {
                "shift_skip": ("INT", {"default": 6, "min": 0, "tooltip": skip}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": start}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": end}),
            }
        }

    def process(self, shift_skip: int, start_percent: float, end_percent: float) -> tuple[LatentShift]:
        """The settings."""
        return (LatentShift(skip=shift_skip, start_percent=start_percent, end_percent=end_percent),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoLoopArgs)
