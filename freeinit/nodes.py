"""The node of FreeInit."""

from __future__ import annotations

from ..node_tools import CATEGORY, Inputs, mappings
from .iterations import FreeInit

OFF = "none"


class WanVideoFreeInitArgs:
    """Samples the video several times, each from noise that keeps the low frequencies of the one before."""

    DISPLAY_NAME = "WanVideo Free Init Args"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("FREEINITARGS",)
    RETURN_NAMES = ("freeinit_args",)
    EXPERIMENTAL = True
    DESCRIPTION = (
        "FreeInit (https://github.com/TianxingWu/FreeInit): samples several times, each time from noise that keeps the "
        "low frequencies of the video before. Frames agree better; the time is multiplied."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        count = {"default": 3, "min": 1, "max": 10, "tooltip": "How often the video is sampled; 1 changes nothing"}
        method = {"default": "ideal", "tooltip": "How low frequencies are told from high ones; none turns FreeInit off"}
        order = {"default": 4, "min": 1, "max": 10, "tooltip": "How steep butterworth is; the others do not read it"}
        cutoff = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
        space, time = (
            {**cutoff, "tooltip": f"Frequencies in {where} up to this come from the video before; 0: none do"}
            for where in ("space", "time")
        )
        return {
            "required": {
                "freeinit_num_iters": ("INT", count),
                "freeinit_method": (["butterworth", "ideal", "gaussian", OFF], method),
                "freeinit_n": ("INT", order),
                "freeinit_d_s": ("FLOAT", space),
                "freeinit_d_t": ("FLOAT", time),
            }
        }

    def process(
        self,
        freeinit_num_iters: int,
        freeinit_method: str,
        freeinit_n: int,
        freeinit_d_s: float,
        freeinit_d_t: float,
    ) -> tuple[FreeInit | None]:
        """The settings; None where the method is none."""
        if freeinit_method == OFF:
            return (None,)
        settings = FreeInit(
            iterations=freeinit_num_iters,
            method=freeinit_method,
            order=freeinit_n,
            spatial=freeinit_d_s,
            temporal=freeinit_d_t,
        )
        return (settings,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoFreeInitArgs)
