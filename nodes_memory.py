"""Nodes that say how much of the GPU's memory a model may take."""

from __future__ import annotations

from .node_tools import CATEGORY, Inputs, mappings
from .wanvideo.block_swap import BlockSwapArgs


class WanVideoVRAMManagement:
    """Keeps a share of the transformer in main memory, whatever its number of blocks; 1.0 takes the least GPU memory.

    The same copies beside the computation as WanVideoBlockSwap, of every list of blocks. Source of the idea: the
    layer by layer offloading of DiffSynth-Studio, which waits for each copy.
    """

    DISPLAY_NAME = "WanVideo VRAM Management"
    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("VRAM_MANAGEMENTARGS",)
    RETURN_NAMES = ("vram_management_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "offload_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Share of the blocks that wait in main memory; at 1.0 the embeddings wait, too",
                    },
                )
            }
        }

    def setargs(self, offload_percent: float) -> tuple[BlockSwapArgs]:
        """The share, as settings of block swap. Raises ValueError for one that is not between 0 and 1."""
        if not 0 <= offload_percent <= 1:
            raise ValueError(f"offload_percent is a share from 0.0 to 1.0, not {offload_percent}.")
        return (BlockSwapArgs(share=float(offload_percent)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoVRAMManagement)
