"""Loader nodes: transformer, VAE, text and vision encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .attention import ATTENTION_MODES
from .host import get_host
from .node_checks import Types, check_loadable, verdict
from .node_tools import CATEGORY, DTYPES, TEXT_ENCODERS, Inputs, files, find_model, find_text_encoder, mappings
from .registry import SYSTEMS
from .wanvideo.block_swap import BlockSwapArgs
from .wanvideo.compilation import CompileArgs
from .wanvideo.load_plan import LoadOptions, module_files, planned
from .wanvideo.loading import Elsewhere, WanVideoModel, load_wan_model
from .wanvideo.lora import LoraFile, lora_files
from .wanvideo.modules.clip import ClipVision, load_clip_vision
from .wanvideo.modules.t5 import TextEncoder, load_text_encoder
from .wanvideo.modules.tiny_vae import TinyVAE, load_tiny_vae
from .wanvideo.modules.vae import WanVAE, load_vae
from .wanvideo.quantization import QUANTIZATIONS

log = logging.getLogger("wanvideo")

LOAD_DEVICES = ["main_device", "offload_device"]


class WanVideoModelLoader:
    """Loads a Wan transformer from models/diffusion_models."""

    DISPLAY_NAME = "WanVideo Model Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)
    RENAMED_INPUTS = {"vace_model": "extra_model"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (
                    files("unet_gguf", "diffusion_models"),
                    {"tooltip": "A Wan 2.1 or 2.2 transformer in models/diffusion_models, .safetensors or .gguf"},
                ),
                "base_precision": (["fp32", "bf16", "fp16", "fp16_fast"], {"default": "bf16"}),
                "quantization": (
                    list(QUANTIZATIONS),
                    {"default": "disabled", "tooltip": "'disabled' keeps what the file holds, FP8 included"},
                ),
                "load_device": (LOAD_DEVICES, {"default": "offload_device", "tooltip": "Where the model waits"}),
            },
            "optional": {
                "attention_mode": (list(ATTENTION_MODES), {"default": "sdpa"}),
                "compile_args": ("WANCOMPILEARGS",),
                "block_swap_args": ("BLOCKSWAPARGS",),
                "lora": ("WANVIDLORA", {"default": None}),
                "vram_management_args": ("VRAM_MANAGEMENTARGS", {"default": None}),
                "extra_model": ("VACEPATH", {"default": None}),
                "fantasytalking_model": ("FANTASYTALKINGMODEL", {"default": None}),
                "multitalk_model": ("MULTITALKMODEL", {"default": None}),
                "fantasyportrait_model": ("FANTASYPORTRAITMODEL", {"default": None}),
                "rms_norm_function": (
                    ["default", "pytorch"],
                    {"default": "default", "tooltip": "Both run the same kernel here"},
                ),
                "multi_gpu_args": ("MULTIGPUARGS", {"default": None}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        model: str = "",
        base_precision: str = "bf16",
        quantization: str = "disabled",
        attention_mode: str = "sdpa",
        input_types: Types | None = None,
    ) -> bool:
        """A transformer, by its header, that these options can run on this machine."""
        options = {"base_precision": base_precision, "quantization": quantization, "attention_mode": attention_mode}

        def check(model: str, base_precision: str, **chosen: str) -> None:
            planned(find_model(model), LoadOptions(base_dtype=DTYPES[base_precision], **chosen), get_host(), SYSTEMS)

        return verdict(cls, check, input_types, model=model, **options)

    def loadmodel(
        self,
        model: str,
        base_precision: str,
        load_device: str,
        quantization: str,
        compile_args: CompileArgs | None = None,
        attention_mode: str = "sdpa",
        block_swap_args: BlockSwapArgs | None = None,
        lora: Sequence[LoraFile] | None = None,
        vram_management_args: BlockSwapArgs | None = None,
        *,
        rms_norm_function: str = "default",
        multi_gpu_args: Elsewhere | None = None,
        **sockets: object,
    ) -> tuple[WanVideoModel]:
        """Load it as the widgets say. sockets: module files, by their names.

        Raises ValueError where both ways to offload are connected.
        """
        if block_swap_args is not None and vram_management_args is not None:
            raise ValueError(
                "block_swap_args and vram_management_args are two ways to keep weights in main memory: disconnect one."
            )
        options = LoadOptions(
            base_dtype=DTYPES[base_precision],
            quantization=quantization,
            attention_mode=attention_mode,
            modules=module_files(sockets.items()),
            loras=lora_files(lora),
            block_swap=block_swap_args or vram_management_args,
            compile=compile_args,
            fp16_accumulation=base_precision == "fp16_fast",
            keep_on_device=load_device == "main_device",
        )
        return (load_wan_model(find_model(model), options, get_host(), SYSTEMS, elsewhere=multi_gpu_args),)


class WanVideoVAELoader:
    """Loads a Wan VAE from models/vae."""

    DISPLAY_NAME = "WanVideo VAE Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVAE",)
    RETURN_NAMES = ("vae",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"model_name": (files("vae"), {"tooltip": "A Wan 2.1 or 2.2 VAE in models/vae"})},
            "optional": {
                "precision": (["fp16", "fp32", "bf16"], {"default": "bf16"}),
                "compile_args": ("WANCOMPILEARGS", {"tooltip": "Taken from older graphs; the VAE is not compiled"}),
                "use_cpu_cache": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Not needed: frames always stream, and the cache does not grow"},
                ),
                "verbose": ("BOOLEAN", {"default": False, "tooltip": "The log always says what was loaded"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """A VAE, by its header."""

        def check(model_name: str) -> None:
            check_loadable(get_host().find_file("vae", model_name), cls.DISPLAY_NAME)

        return verdict(cls, check, input_types, model_name=model_name)

    def loadmodel(
        self,
        model_name: str,
        precision: str = "bf16",
        compile_args: CompileArgs | None = None,
        use_cpu_cache: bool = False,
        verbose: bool = False,
    ) -> tuple[WanVAE]:
        """Load it. Options that the VAE here has no need of are taken, and change nothing."""
        if compile_args is not None:
            log.warning("compile_args change nothing for the VAE: it is not compiled here.")
        host = get_host()
        return (load_vae(host.find_file("vae", model_name), dtype=DTYPES[precision], host=host),)


class WanVideoTinyVAELoader:
    """Loads a tiny VAE (TAEW2.1, TAEW2.2, LightTAE) from models/vae_approx: fast, small and a little blurred."""

    DISPLAY_NAME = "WanVideo Tiny VAE Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVAE",)
    RETURN_NAMES = ("vae",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"model_name": (files("vae_approx"), {"tooltip": "taew2_1, taew2_2 or a lighttae file"})},
            "optional": {
                "precision": (["fp16", "fp32", "bf16"], {"default": "fp16"}),
                "parallel": ("BOOLEAN", {"default": False, "tooltip": "Not needed: frames always stream"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """A tiny VAE, by its header."""

        def check(model_name: str) -> None:
            check_loadable(get_host().find_file("vae_approx", model_name), cls.DISPLAY_NAME)

        return verdict(cls, check, input_types, model_name=model_name)

    def loadmodel(self, model_name: str, precision: str = "fp16", parallel: bool = False) -> tuple[TinyVAE]:
        """Load it."""
        host = get_host()
        return (load_tiny_vae(host.find_file("vae_approx", model_name), dtype=DTYPES[precision], host=host),)


class LoadWanVideoT5TextEncoder:
    """Loads a UMT5 text encoder from models/text_encoders."""

    DISPLAY_NAME = "WanVideo T5 Text Encoder Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANTEXTENCODER",)
    RETURN_NAMES = ("wan_t5_model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model_name": (files(*TEXT_ENCODERS), {"tooltip": "A umt5-xxl encoder in models/text_encoders"}),
                "precision": (["fp32", "bf16"], {"default": "bf16"}),
            },
            "optional": {
                "load_device": (LOAD_DEVICES, {"default": "offload_device"}),
                "quantization": (["disabled", "fp8_e4m3fn"], {"default": "disabled"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """A text encoder, by its header."""

        def check(model_name: str) -> None:
            check_loadable(find_text_encoder(model_name), cls.DISPLAY_NAME)

        return verdict(cls, check, input_types, model_name=model_name)

    def loadmodel(
        self, model_name: str, precision: str, load_device: str = "offload_device", quantization: str = "disabled"
    ) -> tuple[TextEncoder]:
        """Load it."""
        host = get_host()
        path = find_text_encoder(model_name)
        encoder = load_text_encoder(path, dtype=DTYPES[precision], quantization=quantization, host=host)
        if load_device == "main_device":
            encoder.managed.acquire()
        return (encoder,)


class LoadWanVideoClipTextEncoder:
    """Loads the CLIP vision encoder of Wan's image-to-video models. The name is the original's."""

    DISPLAY_NAME = "WanVideo CLIP Text Encoder Loader"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("CLIP_VISION",)
    RETURN_NAMES = ("wan_clip_vision",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model_name": (files("clip_vision", "text_encoders"), {"tooltip": "A CLIP ViT-H vision encoder"}),
                "precision": (["fp16", "fp32", "bf16"], {"default": "fp16"}),
            },
            "optional": {"load_device": (LOAD_DEVICES, {"default": "offload_device"})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """A vision encoder, by its header."""

        def check(model_name: str) -> None:
            check_loadable(_find_clip(model_name), cls.DISPLAY_NAME, "Load CLIP Vision")

        return verdict(cls, check, input_types, model_name=model_name)

    def loadmodel(self, model_name: str, precision: str, load_device: str = "offload_device") -> tuple[ClipVision]:
        """Load it from either folder."""
        encoder = load_clip_vision(_find_clip(model_name), dtype=DTYPES[precision], host=get_host())
        if load_device == "main_device":
            encoder.managed.acquire()
        return (encoder,)


def _find_clip(name: str) -> Path:
    host = get_host()
    return host.find_file("clip_vision" if name in host.list_files("clip_vision") else "text_encoders", name)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoModelLoader,
    WanVideoVAELoader,
    WanVideoTinyVAELoader,
    LoadWanVideoT5TextEncoder,
    LoadWanVideoClipTextEncoder,
)
