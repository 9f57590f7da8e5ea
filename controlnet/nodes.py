"""Nodes of the Wan controlnets: the loader, and what gives one to a model."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..host import get_host
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from ..registry import SYSTEMS
from ..wanvideo.finite import check_finite
from ..wanvideo.loading import WanVideoModel
from ..wanvideo.own_model import open_own
from .controlnet import KIND, QUANTIZATIONS, ControlnetModel, load_controlnet
from .extension import ControlArgs


class WanVideoControlnetLoader:
    """Loads a Wan controlnet from models/controlnet."""

    DISPLAY_NAME = "WanVideo Controlnet Loader"
    DESCRIPTION = "Loads one of TheDenk's controlnets (depth, canny, HED, tile, ...) for Wan 2.1 or 2.2."
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOCONTROLNET",)
    RETURN_NAMES = ("controlnet",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (
                    files("controlnet"),
                    {"tooltip": "A Wan controlnet in models/controlnet, of the size of the model: 1.3B, 5B or 14B"},
                ),
                "base_precision": (
                    ["fp32", "bf16", "fp16"],
                    {"default": "bf16", "tooltip": "Precision of weights and activations"},
                ),
                "quantization": (
                    list(QUANTIZATIONS),
                    {
                        "default": "disabled",
                        "tooltip": "FP8 halves the memory of the weights; '_fast' multiplies in FP8, '_no_ffn' not in "
                        "the feed-forward layers",
                    },
                ),
                "load_device": (
                    ["main_device", "offload_device"],
                    {"default": "main_device", "tooltip": "Where the controlnet waits for its first run"},
                ),
            }
        }

    def loadmodel(self, model: str, base_precision: str, load_device: str, quantization: str) -> tuple[ControlnetModel]:
        """Load it as the widgets say."""
        host = get_host()
        path = host.find_file("controlnet", model)
        loaded = load_controlnet(
            path,
            open_own(path, KIND, SYSTEMS),
            base_dtype=DTYPES[base_precision],
            quantization=quantization,
            host=host,
        )
        if load_device == "main_device":
            loaded.managed.acquire()
        return (loaded,)


class WanVideoControlnet:
    """Gives a model a controlnet and its control video."""

    DISPLAY_NAME = "WanVideo Controlnet Apply"
    DESCRIPTION = "Gives the model a controlnet that follows a control video (depth, edges, ...)."
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.0001}
        stride = {"default": 3, "min": 1, "max": 8, "step": 1}
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": "The model that is steered"}),
                "controlnet": ("WANVIDEOCONTROLNET", {"tooltip": "From 'WanVideo Controlnet Loader'"}),
                "control_images": ("IMAGE", {"tooltip": "The control video, as long and as large as the video"}),
                "strength": ("FLOAT", {**strength, "tooltip": "How strongly the control video is followed; 0 is off"}),
                "control_stride": (
                    "INT",
                    {**stride, "tooltip": "Steer one of how many blocks: what the controlnet was trained with"},
                ),
                "control_start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "The part of the steps where it begins"},
                ),
                "control_end_percent": (
                    "FLOAT",
                    {"default": 1.0, **percent, "tooltip": "The part of the steps before which it ends"},
                ),
            }
        }

    def loadmodel(
        self,
        model: WanVideoModel,
        controlnet: ControlnetModel,
        control_images: Tensor,
        strength: float,
        control_stride: int,
        control_start_percent: float,
        control_end_percent: float,
    ) -> tuple[WanVideoModel]:
        """A copy of the model that brings the controlnet to every run."""
        if not isinstance(controlnet, ControlnetModel):
            raise ValueError("The controlnet is not one of Wan's: connect 'WanVideo Controlnet Loader'.")
        if any(isinstance(payload, ControlArgs) for payload in model.payloads):
            raise ValueError("The model has a controlnet already, and only one can steer it: leave one of the two out.")
        check_finite("The control_images hold", control_images, unit="frame")
        control = control_images[..., :3].permute(3, 0, 1, 2)[None] * 2 - 1
        args = ControlArgs(
            controlnet, control.contiguous(), strength, control_stride, control_start_percent, control_end_percent
        )
        return (replace(model, payloads=(*model.payloads, args)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoControlnetLoader, WanVideoControlnet)
