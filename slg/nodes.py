"""The node of skip layer guidance."""

from __future__ import annotations

from ..node_checks import Types, verdict
from ..node_tools import CATEGORY, Inputs, mappings, whole_numbers
from .extension import SkippedBlocks


class WanVideoSLG:
    """Skips blocks in passes without the prompt."""

    DISPLAY_NAME = "WanVideo SLG"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("SLGARGS",)
    RETURN_NAMES = ("slg_args",)
    DESCRIPTION = (
        "Skip layer guidance: the pass without the prompt, which cfg leads away from, goes around these blocks and is "
        "weaker for it. It sharpens detail and motion, and acts only where cfg is not 1."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        blocks = "Blocks to skip, counted from 0 and separated by commas: 9 or 10 is usual"
        start = "Part of the steps before which no block is skipped; the first ones lay out the picture"
        return {
            "required": {
                "blocks": ("STRING", {"default": "10", "tooltip": blocks}),
                "start_percent": ("FLOAT", {"default": 0.1, **percent, "tooltip": start}),
                "end_percent": (
                    "FLOAT", {"default": 1.0, **percent, "tooltip": "Part of the steps after which none is skipped"}
                ),
            }
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, blocks: str = "", input_types: Types | None = None) -> bool:
        """A list of whole numbers."""
        return verdict(cls, lambda blocks: whole_numbers("blocks", blocks), input_types, blocks=blocks)

    def process(self, blocks: str, start_percent: float, end_percent: float) -> tuple[SkippedBlocks]:
        """The settings. Raises ValueError for a list that is not of whole numbers."""
        return (SkippedBlocks(whole_numbers("blocks", blocks), start_percent, end_percent),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoSLG)
