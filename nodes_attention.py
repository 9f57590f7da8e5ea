"""Nodes that set which attention runs where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from .attention import ATTENTION_MODES
from .node_checks import Types, verdict
from .node_tools import CATEGORY, Inputs, mappings
from .wanvideo.attention_plan import RadialSettings, Rule, plan_for, with_radial, with_ultravico
from .wanvideo.loading import WanVideoModel

MODEL_TIP = "A loaded model; what else it is connected to keeps it as it was"
DENSE_MODES = ["sdpa", "flash_attn_2", "flash_attn_3", "sageattn", "sparse_sage_attention"]


class WanVideoSetAttentionModeOverride:
    """Runs another attention in some steps and blocks of a loaded model."""

    DISPLAY_NAME = "WanVideo Set Attention Mode Override"
    CATEGORY = CATEGORY
    FUNCTION = "getmodelpath"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        step = {"max": 10000, "step": 1}
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": MODEL_TIP}),
                "attention_mode": (list(ATTENTION_MODES), {"default": "sdpa", "tooltip": "In these steps and blocks"}),
                "start_step": ("INT", {"default": 0, "min": 0, **step, "tooltip": "First step of the sampler's run"}),
                "end_step": ("INT", {"default": 10000, "min": 1, **step, "tooltip": "The step it ends before"}),
                "verbose": ("BOOLEAN", {"default": False, "tooltip": "Log each step where it applies"}),
            },
            "optional": {
                "blocks": ("INT", {"forceInput": True, "tooltip": "From WanVideo Block List; all where unconnected"})
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, start_step: int = 0, end_step: int = 10000, input_types: Types | None = None
    ) -> bool:
        """Steps that it applies to."""
        return verdict(cls, _check_steps, input_types, start_step=start_step, end_step=end_step)

    def getmodelpath(
        self,
        model: WanVideoModel,
        attention_mode: str,
        start_step: int,
        end_step: int,
        verbose: bool,
        blocks: int | Sequence[int] | None = None,
    ) -> tuple[WanVideoModel]:
        """The same model with this override; a later one counts before an earlier one."""
        if isinstance(blocks, int):
            blocks = (blocks,)
        _check_steps(start_step, end_step)
        if blocks == []:
            raise ValueError("This override of the attention applies nowhere: its list of blocks is empty.")
        rule = Rule(
            plan=plan_for(attention_mode, model.attention_spec),
            steps=(start_step, end_step),
            blocks=None if blocks is None else frozenset(blocks),
            verbose=verbose,
        )
        _check_blocks(rule.blocks, model)
        return (replace(model, attention=model.attention.before(rule)),)


def _check_steps(start_step: int, end_step: int) -> None:
    if start_step >= end_step:
        raise ValueError(
            f"This override of the attention applies nowhere (steps {start_step} to {end_step}): let start_step be "
            "below end_step."
        )


def _check_blocks(blocks: frozenset[int] | None, model: WanVideoModel) -> None:
    count = model.config.num_layers
    beyond = sorted(block for block in blocks or () if not 0 <= block < count)
    if beyond:
        raise ValueError(f"This model has the blocks 0 to {count - 1}, but the override names {beyond}.")


class WanVideoSetRadialAttention:
    """Settings of radial_sage_attention: how sparse it is, and where attention stays dense."""

    DISPLAY_NAME = "WanVideo Set Radial Attention"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": MODEL_TIP}),
                "dense_attention_mode": (
                    DENSE_MODES,
                    {"default": "sageattn", "tooltip": "Where attention is not sparse"},
                ),
                "dense_blocks": (
                    "INT",
                    {"default": 1, "min": 0, "max": 40, "step": 1, "tooltip": "So many first blocks are dense"},
                ),
                "dense_vace_blocks": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": 15,
                        "step": 1,
                        "tooltip": "Of VACE models, not loaded yet",
                    },
                ),
                "dense_timesteps": (
                    "INT",
                    {"default": 2, "min": 0, "max": 100, "step": 1, "tooltip": "The first steps are dense"},
                ),
                "decay_factor": (
                    "FLOAT",
                    {"default": 0.2, "min": 0, "max": 1, "step": 0.01, "tooltip": "Larger windows, less sparse"},
                ),
                "block_size": ([128, 64], {"default": 128, "tooltip": "Tokens of a block of the sparse mask"}),
            }
        }

    def loadmodel(
        self,
        model: WanVideoModel,
        dense_attention_mode: str,
        dense_blocks: int | Sequence[int],
        dense_vace_blocks: int,
        dense_timesteps: int,
        decay_factor: float,
        block_size: int,
    ) -> tuple[WanVideoModel]:
        """The same model with these settings."""
        settings = RadialSettings(
            dense=dense_attention_mode,
            # A number of first blocks, or which ones, from WanVideo Block List.
            dense_blocks=frozenset(range(dense_blocks) if isinstance(dense_blocks, int) else dense_blocks),
            dense_steps=dense_timesteps,
            decay=decay_factor,
            block=block_size,
        )
        return (replace(model, attention=with_radial(model.attention, settings, model.attention_spec)),)


class WanVideoUltraVicoSettings:
    """The decay of sageattn_ultravico."""

    DISPLAY_NAME = "WanVideo UltraVico Settings"
    CATEGORY = CATEGORY
    FUNCTION = "getmodelpath"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        alpha = {"default": 0.9, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "1 is no decay of far tokens"}
        return {"required": {"model": ("WANVIDEOMODEL", {"tooltip": MODEL_TIP}), "alpha": ("FLOAT", alpha)}}

    def getmodelpath(self, model: WanVideoModel, alpha: float) -> tuple[WanVideoModel]:
        """The same model with this alpha."""
        return (replace(model, attention=with_ultravico(model.attention, alpha)),)


class WanVideoBlockList:
    """Block numbers from text: commas, lines, and ranges such as 0-5."""

    DISPLAY_NAME = "WanVideo Block List"
    CATEGORY = CATEGORY
    FUNCTION = "create_list"
    RETURN_TYPES = ("INT",)
    RETURN_NAMES = ("block_list",)
    DESCRIPTION: ClassVar[str] = "Numbers and ranges of blocks: '1', '0,2,3-5'."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"blocks": ("STRING", {"default": "1", "multiline": True, "tooltip": "Such as 0,2,3-5"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, blocks: str = "", input_types: Types | None = None) -> bool:
        """Numbers and ranges."""
        return verdict(cls, cls().create_list, input_types, blocks=blocks)

    def create_list(self, blocks: str) -> tuple[list[int]]:
        """The numbers, in the order given. Raises ValueError for anything else."""
        found: list[int] = []
        for part in filter(None, (part.strip() for part in blocks.replace("\n", ",").split(","))):
            first, _, last = part.partition("-")
            if not first.strip().isdigit() or (last and not last.strip().isdigit()):
                raise ValueError(f"'{part}' is neither a block number nor a range such as 0-5.")
            if int(last or first) < int(first):
                raise ValueError(f"The range '{part}' is empty: the smaller number comes first.")
            found += range(int(first), int(last or first) + 1)
        return (found,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoSetAttentionModeOverride,
    WanVideoSetRadialAttention,
    WanVideoUltraVicoSettings,
    WanVideoBlockList,
)
