"""Nodes of Uni3C: its loader, and what it steers a run by."""

from __future__ import annotations

from torch import Tensor

from ..host import get_host
from ..node_checks import Types, need_link, verdict
from ..node_tools import CATEGORY, DTYPES, Inputs, Latent, files, mappings
from ..registry import SYSTEMS
from ..wanvideo.compilation import CompileArgs
from ..wanvideo.own_model import open_own
from .controlnet import KIND, Uni3CModel, Uni3COptions, load_uni3c
from .extension import Uni3CArgs

NO_RENDER = "Uni3C has nothing to follow: encode a rendered video and connect it to render_latent."


class WanVideoUni3C_ControlnetLoader:  # noqa: N801 - the name in saved graphs
    """Loads the Uni3C controlnet from models/controlnet."""

    DISPLAY_NAME = "WanVideo Uni3C Controlnet Loader"
    DESCRIPTION = "Loads the Uni3C controlnet, which steers the camera of 14B models by a rendered video."
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOCONTROLNET",)
    RETURN_NAMES = ("controlnet",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (files("controlnet"), {"tooltip": "The Uni3C controlnet in models/controlnet"}),
                "base_precision": (
                    ["fp32", "bf16", "fp16"],
                    {"default": "fp16", "tooltip": "Precision of weights and activations; the file is fp16"},
                ),
                "quantization": (
                    ["disabled", "fp8_e4m3fn", "fp8_e5m2"],
                    {"default": "disabled", "tooltip": "FP8 halves the memory of weights; 'disabled' keeps the file's"},
                ),
                "load_device": (
                    ["main_device", "offload_device"],
                    {"default": "offload_device", "tooltip": "Where the controlnet waits for its first run"},
                ),
                "attention_mode": (
                    ["sdpa", "sageattn"],
                    {"default": "sdpa", "tooltip": "Attention of the controlnet alone"},
                ),
            },
            "optional": {"compile_args": ("WANCOMPILEARGS", {"tooltip": "Compile the controlnet's blocks"})},
        }

    def loadmodel(
        self,
        model: str,
        base_precision: str,
        load_device: str,
        quantization: str,
        attention_mode: str,
        compile_args: CompileArgs | None = None,
    ) -> tuple[Uni3CModel]:
        """Load it as the widgets say."""
        host = get_host()
        path = host.find_file("controlnet", model)
        options = Uni3COptions(
            base_dtype=DTYPES[base_precision],
            quantization=quantization,
            attention_mode=attention_mode,
            compile=compile_args,
        )
        loaded = load_uni3c(path, open_own(path, KIND, SYSTEMS), options, host)
        if load_device == "main_device":
            loaded.managed.acquire()
        return (loaded,)


class WanVideoUni3C_embeds:  # noqa: N801 - the name in saved graphs
    """What Uni3C steers a run by."""

    DISPLAY_NAME = "WanVideo Uni3C Embeds"
    DESCRIPTION = "Steers the camera by a rendered video: connect it to uni3c_embeds of the sampler."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("UNI3C_EMBEDS",)
    RETURN_NAMES = ("uni3c_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                "controlnet": ("WANVIDEOCONTROLNET", {"tooltip": "From the Uni3C controlnet loader"}),
                "strength": ("FLOAT", {**strength, "tooltip": "How strongly the render is followed; 0 is off"}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": "Where in the steps it begins"}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "Where in the steps it ends"}),
            },
            "optional": {
                "render_latent": ("LATENT", {"tooltip": "The rendered video, encoded with the model's VAE"}),
                "render_mask": ("MASK", {"tooltip": "Where the render is valid, for files that read a mask alone"}),
                "offload": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Keep the controlnet in main memory, block by block on the GPU"},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Types | None = None) -> bool:
        """Something to follow."""
        return verdict(cls, lambda: need_link(input_types, "render_latent", NO_RENDER), input_types)

    def process(
        self,
        controlnet: Uni3CModel,
        strength: float,
        start_percent: float,
        end_percent: float,
        render_latent: Latent | None = None,
        render_mask: Tensor | None = None,
        offload: bool = True,
    ) -> tuple[Uni3CArgs]:
        """Collect them."""
        if not isinstance(controlnet, Uni3CModel):
            raise ValueError("The controlnet is not Uni3C's: connect 'WanVideo Uni3C Controlnet Loader'.")
        if render_latent is None:
            raise ValueError(NO_RENDER)
        render = render_latent["samples"]
        extra = controlnet.module.sizes.extra
        if render_mask is not None and extra != 1:
            raise ValueError(
                f"{controlnet.path.name} reads {extra} channels of mask and camera rays, and no node gives the rays: "
                "disconnect render_mask."
            )
        mask = None if render_mask is None else render_mask.reshape(1, 1, -1, *render_mask.shape[-2:])
        return (Uni3CArgs(controlnet, render[:1], strength, start_percent, end_percent, mask, offload),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoUni3C_ControlnetLoader, WanVideoUni3C_embeds)
