"""The node of Enhance-A-Video."""

from __future__ import annotations

from ..node_tools import CATEGORY, Inputs, mappings
from .extension import EnhanceArgs


class WanVideoEnhanceAVideo:
    """Amplifies self-attention where frames agree, for more detail and consistency."""

    DISPLAY_NAME = "WanVideo Enhance-A-Video"
    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("FETAARGS",)
    RETURN_NAMES = ("feta_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "weight": ("FLOAT", {"default": 2.0, "min": 0, "max": 100, "step": 0.01, "tooltip": "0 has no effect"}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Share of the steps before it starts"},
                ),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "Share of the steps when it ends"}),
            }
        }

    def setargs(self, weight: float, start_percent: float, end_percent: float) -> tuple[EnhanceArgs]:
        """Collect the settings."""
        return (EnhanceArgs(weight, start_percent, end_percent),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoEnhanceAVideo)
