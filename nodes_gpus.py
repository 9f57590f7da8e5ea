"""The node that lets several GPUs of this machine make one video."""

from __future__ import annotations

import logging

from .distributed.host import RankHost
from .distributed.launch import devices
from .distributed.standing import StandingRanks
from .host import get_host
from .node_checks import Types, verdict
from .node_tools import CATEGORY, Inputs, mappings

log = logging.getLogger("wanvideo")

MOST_GPUS = 16


class WanVideoMultiGPU:
    """Lets several GPUs sample a video together; connect it to multi_gpu_args of WanVideo Model Loader.

    The ranks start with the first run and stay, with their models, as long as ComfyUI keeps the node's output.
    """

    DISPLAY_NAME = "WanVideo Multi GPU"
    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("MULTIGPUARGS",)
    RETURN_NAMES = ("multi_gpu_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "The first so many GPUs that torch sees; each holds the whole model"
        return {"required": {"gpus": ("INT", {"default": 2, "min": 2, "max": MOST_GPUS, "tooltip": tip})}}

    @classmethod
    def VALIDATE_INPUTS(cls, gpus: int = 2, input_types: Types | None = None) -> bool:
        """As many as there are."""
        return verdict(cls, lambda gpus: devices(get_host().device().type, gpus), input_types, gpus=gpus)

    def setargs(self, gpus: int) -> tuple[StandingRanks | None]:
        """The ranks, which are not started yet. Raises ValueError where there are fewer GPUs."""
        host = get_host()
        if isinstance(host, RankHost):
            log.info("WanVideo Multi GPU changes nothing here: --gpus says how many make the video.")
            return (None,)
        return (StandingRanks(gpus, host.device().type),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoMultiGPU)
