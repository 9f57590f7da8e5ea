"""Nodes that set how a model runs: block swap and compilation."""

from __future__ import annotations

from dataclasses import replace

from .linked_values import add_form
from .node_tools import CATEGORY, Inputs, mappings
from .wanvideo.block_swap import BlockSwapArgs
from .wanvideo.compilation import CompileArgs
from .wanvideo.loading import WanVideoModel


class WanVideoTorchCompileSettings:
    """Settings of torch.compile for the transformer's blocks."""

    DISPLAY_NAME = "WanVideo Torch Compile Settings"
    CATEGORY = CATEGORY
    FUNCTION = "set_args"
    RETURN_TYPES = ("WANCOMPILEARGS",)
    RETURN_NAMES = ("torch_compile_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        modes = ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"]
        size = {"min": 0, "max": 1024, "step": 1}
        return {
            "required": {
                "backend": (["inductor", "cudagraphs"], {"default": "inductor"}),
                "fullgraph": ("BOOLEAN", {"default": False, "tooltip": "Blocks compile as one graph either way"}),
                "mode": (modes, {"default": "default"}),
                "dynamic": ("BOOLEAN", {"default": False, "tooltip": "One graph for all sizes, a little slower"}),
                "dynamo_cache_size_limit": ("INT", {"default": 64, **size}),
                "compile_transformer_blocks_only": ("BOOLEAN", {"default": True, "tooltip": "Always so here"}),
            },
            "optional": {
                "dynamo_recompile_limit": ("INT", {"default": 128, **size}),
                "force_parameter_static_shapes": ("BOOLEAN", {"default": False}),
                "allow_unmerged_lora_compile": ("BOOLEAN", {"default": False, "tooltip": "Always works here"}),
            },
        }

    def set_args(
        self,
        backend: str,
        fullgraph: bool,
        mode: str,
        dynamic: bool,
        dynamo_cache_size_limit: int,
        compile_transformer_blocks_only: bool,
        dynamo_recompile_limit: int = 128,
        force_parameter_static_shapes: bool = False,
        allow_unmerged_lora_compile: bool = False,
    ) -> tuple[CompileArgs]:
        """Collect the settings."""
        args = CompileArgs(
            backend=backend,
            fullgraph=fullgraph,
            mode=mode,
            dynamic=dynamic,
            dynamo_cache_size_limit=dynamo_cache_size_limit,
            dynamo_recompile_limit=dynamo_recompile_limit,
            compile_transformer_blocks_only=compile_transformer_blocks_only,
            force_parameter_static_shapes=force_parameter_static_shapes,
            allow_unmerged_lora_compile=allow_unmerged_lora_compile,
        )
        return (args,)


class WanVideoBlockSwap:
    """Keeps blocks in main memory and brings each to the GPU for its turn."""

    DISPLAY_NAME = "WanVideo Block Swap"
    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("BLOCKSWAPARGS",)
    RETURN_NAMES = ("block_swap_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "blocks_to_swap": (
                    "INT",
                    {
                        "default": 20,
                        "min": -1,
                        "max": 48,
                        "step": 1,
                        "tooltip": "Blocks that wait in main memory; -1: as many as the free GPU memory asks for",
                    },
                ),
                "offload_img_emb": ("BOOLEAN", {"default": False, "tooltip": "The CLIP image embedding waits too"}),
                "offload_txt_emb": ("BOOLEAN", {"default": False, "tooltip": "The text embedding waits too"}),
            },
            "optional": {
                "use_non_blocking": ("BOOLEAN", {"default": False}),
                "vace_blocks_to_swap": ("INT", {"default": 0, "min": 0, "max": 15, "step": 1}),
                "prefetch_blocks": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 40,
                        "step": 1,
                        "tooltip": "Blocks on their way to the GPU while one runs: 0 and 1 are the same, and enough; "
                        "each takes GPU memory",
                    },
                ),
                "block_swap_debug": ("BOOLEAN", {"default": False}),
            },
        }

    def setargs(
        self,
        blocks_to_swap: int,
        offload_img_emb: bool,
        offload_txt_emb: bool,
        use_non_blocking: bool = False,
        vace_blocks_to_swap: int = 0,
        prefetch_blocks: int = 0,
        block_swap_debug: bool = False,
    ) -> tuple[BlockSwapArgs]:
        """Collect the settings."""
        waiting = {"img_emb": offload_img_emb, "text_embedding": offload_txt_emb}
        args = BlockSwapArgs(
            blocks_to_swap=blocks_to_swap,
            embeddings=tuple(name for name, waits in waiting.items() if waits),
            use_non_blocking=use_non_blocking,
            others={"vace_blocks": vace_blocks_to_swap},
            prefetch_blocks=prefetch_blocks,
            block_swap_debug=block_swap_debug,
        )
        return (args,)


class WanVideoSetBlockSwap:
    """Sets block swap on a loaded model."""

    DISPLAY_NAME = "WanVideo Set BlockSwap"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": ("WANVIDEOMODEL",)}, "optional": {"block_swap_args": ("BLOCKSWAPARGS",)}}

    def loadmodel(self, model: WanVideoModel, block_swap_args: BlockSwapArgs | None = None) -> tuple[WanVideoModel]:
        """The same model with these settings."""
        return (model if block_swap_args is None else replace(model, block_swap=block_swap_args),)


def _block_swap(value: object, where: str) -> object:
    """Settings of this pack, also from the dict of ComfyUI-MultiGPU's node of that name."""
    if not isinstance(value, dict) or "blocks_to_swap" not in value:
        return value
    widgets = dict(value)
    device = widgets.pop("swap_device", "cpu")
    if device != "cpu":
        raise ValueError(f"{where} wants blocks to wait on {device}; here they wait in main memory: choose cpu.")
    return WanVideoBlockSwap().setargs(**widgets)[0]


add_form("BLOCKSWAPARGS", _block_swap)

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoTorchCompileSettings, WanVideoBlockSwap, WanVideoSetBlockSwap
)
