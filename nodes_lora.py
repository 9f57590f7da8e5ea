"""Nodes that choose LoRAs: files, strengths, blocks, and when they join a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from .host import get_host
from .node_checks import Types, verdict
from .node_tools import CATEGORY, Inputs, files, mappings
from .registry import SYSTEMS
from .wanvideo.loading import WanVideoModel, with_loras
from .wanvideo.lora import LoraFile, lora_files
from .wanvideo.lora_weights import refuse

log = logging.getLogger("wanvideo")

_STRENGTH = "1 is what it was trained for; 0 leaves it out. A list gives one value a step"


def _shared_inputs() -> dict[str, tuple[object, ...]]:
    """The optional inputs of all nodes that choose LoRAs."""
    return {
        "prev_lora": ("WANVIDLORA", {"default": None, "tooltip": "LoRAs that come before"}),
        "blocks": ("SELECTEDBLOCKS", {"tooltip": "Only these blocks, from WanVideo Lora Block Edit"}),
        "low_mem_load": ("BOOLEAN", {"default": False, "tooltip": "Merging always uses little memory here"}),
        "merge_loras": ("BOOLEAN", {"default": True, "tooltip": "Into the weights at load, or beside them"}),
    }


class WanVideoLoraSelect:
    """Chooses a LoRA from models/loras."""

    DISPLAY_NAME = "WanVideo Lora Select"
    DESCRIPTION = "Chooses a LoRA from models/loras. The log says which of its keys are used, and why others are not."
    CATEGORY = CATEGORY
    FUNCTION = "getlorapath"
    RETURN_TYPES = ("WANVIDLORA",)
    RETURN_NAMES = ("lora",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "lora": (files("loras"), {"tooltip": "A LoRA in models/loras"}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": -1000.0, "max": 1000.0, "step": 0.0001, "tooltip": _STRENGTH},
                ),
            },
            "optional": _shared_inputs(),
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def getlorapath(
        self,
        lora: str,
        strength: float | Sequence[float],
        unique_id: str | None = None,
        blocks: dict[str, object] | None = None,
        prev_lora: Sequence[LoraFile] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
    ) -> tuple[tuple[LoraFile, ...]]:
        """Add it to the LoRAs before; strength 0 adds nothing."""
        before = lora_files(prev_lora)
        if strength == 0:
            return (before,)
        return ((*before, _lora_file(lora, strength, blocks, merge_loras)),)


def _lora_file(
    name: str, strength: float | Sequence[float], blocks: dict[str, object] | None, merge: bool
) -> LoraFile:
    chosen = blocks or {}
    path = get_host().find_file("loras", name)
    selected, skipped = chosen.get("selected_blocks"), chosen.get("layer_filter", "")
    return LoraFile.chosen(path, strength, selected, skipped, bool(merge))


class WanVideoLoraSelectByName(WanVideoLoraSelect):
    """Chooses a LoRA by its name or a part of it, so that the name can come from another node."""

    DISPLAY_NAME = "WanVideo Lora Select By Name"
    DESCRIPTION = "Chooses the LoRA whose file name is, or contains, the text; the log names it."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "lora_name": ("STRING", {"default": "", "multiline": False, "tooltip": "A file name or a part of it"}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.0001, "tooltip": _STRENGTH},
                ),
            },
            "optional": _shared_inputs(),
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, lora_name: str = "", strength: float = 1.0, input_types: Types | None = None
    ) -> bool:
        """A name that a file has, unless the strength is 0."""

        def check(lora_name: str, strength: float) -> None:
            if strength != 0:
                _matching_loras(lora_name)

        return verdict(cls, check, input_types, lora_name=lora_name, strength=strength)

    def getlorapath(
        self,
        lora_name: str,
        strength: float | Sequence[float],
        unique_id: str | None = None,
        blocks: dict[str, object] | None = None,
        prev_lora: Sequence[LoraFile] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
    ) -> tuple[tuple[LoraFile, ...]]:
        """Of several files that contain the text, the last one, as in the original pack.

        Raises ValueError if the text is empty or no file contains it.
        """
        if strength == 0:
            return (lora_files(prev_lora),)
        matching = _matching_loras(lora_name)
        name = lora_name.strip() if lora_name.strip() in matching else matching[-1]
        log.info("LoRA '%s' is %s%s.", lora_name, name, "" if len(matching) == 1 else f", one of {len(matching)}")
        return super().getlorapath(
            name, strength, blocks=blocks, prev_lora=prev_lora, low_mem_load=low_mem_load, merge_loras=merge_loras
        )


def _matching_loras(text: str) -> list[str]:
    names = files("loras")
    matching = [name for name in names if text.strip() and text.strip() in name]
    if not matching:
        raise ValueError(
            f"No LoRA in models/loras has '{text}' in its name ({len(names)} files are there): write the file "
            "name or a part of it, or set the strength to 0."
        )
    return matching


class WanVideoLoraBlockEdit:
    """Chooses the blocks that LoRAs change."""

    DISPLAY_NAME = "WanVideo Lora Block Edit"
    DESCRIPTION = "Chooses the blocks that a LoRA changes. Layers outside blocks are always changed."
    CATEGORY = CATEGORY
    FUNCTION = "select"
    RETURN_TYPES = ("SELECTEDBLOCKS",)
    RETURN_NAMES = ("blocks",)
    COUNT: ClassVar[int] = 40

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tooltip = "Parts of names of layers that stay as they are, separated by commas, as: ffn, cross_attn.k"
        switch = ("BOOLEAN", {"default": True, "tooltip": "Whether LoRAs change this block"})
        return {
            "required": {f"blocks.{index}.": switch for index in range(cls.COUNT)},
            "optional": {"layer_filter": ("STRING", {"default": "", "multiline": True, "tooltip": tooltip})},
        }

    def select(self, layer_filter: str = "", **blocks: bool) -> tuple[dict[str, object]]:
        """blocks: one switch for each name, such as "blocks.3."."""
        selected = {name: True for name, wanted in blocks.items() if wanted is True}
        return ({"selected_blocks": selected, "layer_filter": layer_filter.split(",")},)


class WanVideoLoraSelectMulti:
    """Chooses up to five LoRAs."""

    DISPLAY_NAME = "WanVideo Lora Select Multi"
    DESCRIPTION = "Chooses up to five LoRAs from models/loras; 'none' and a strength of 0 add nothing."
    CATEGORY = CATEGORY
    FUNCTION = "getlorapath"
    RETURN_TYPES = ("WANVIDLORA",)
    RETURN_NAMES = ("lora",)
    SLOTS: ClassVar[range] = range(5)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        names = files("loras", first=["none"])
        required: dict[str, tuple[object, ...]] = {}
        for slot in cls.SLOTS:
            required[f"lora_{slot}"] = (names, {"default": "none", "tooltip": "A LoRA in models/loras"})
            required[f"strength_{slot}"] = (
                "FLOAT",
                {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.0001, "tooltip": _STRENGTH},
            )
        return {
            "required": required,
            "optional": _shared_inputs(),
        }

    def getlorapath(
        self,
        lora_0: str,
        strength_0: float,
        lora_1: str,
        strength_1: float,
        lora_2: str,
        strength_2: float,
        lora_3: str,
        strength_3: float,
        lora_4: str,
        strength_4: float,
        blocks: dict[str, object] | None = None,
        prev_lora: Sequence[LoraFile] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
    ) -> tuple[tuple[LoraFile, ...]]:
        """All that are chosen and have a strength."""
        names = (lora_0, lora_1, lora_2, lora_3, lora_4)
        strengths = (strength_0, strength_1, strength_2, strength_3, strength_4)
        chosen = [
            _lora_file(name, strength, blocks, merge_loras)
            for name, strength in zip(names, strengths, strict=True)
            if name and name != "none" and strength != 0
        ]
        return ((*lora_files(prev_lora), *chosen),)


class WanVideoSetLoRAs:
    """Runs LoRAs beside the weights of a loaded model; needs merge_loras off."""

    DISPLAY_NAME = "WanVideo Set LoRAs"
    DESCRIPTION = "Runs LoRAs beside the weights of a loaded model, which stay as they are; needs merge_loras off."
    EXPERIMENTAL = True
    CATEGORY = CATEGORY
    FUNCTION = "setlora"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": ("WANVIDEOMODEL",)}, "optional": {"lora": ("WANVIDLORA",)}}

    def setlora(self, model: WanVideoModel, lora: Sequence[LoraFile] | None = None) -> tuple[WanVideoModel]:
        """The same model with these LoRAs."""
        if lora is None:
            return (model,)
        chosen = lora_files(lora)
        refuse(chosen, SYSTEMS)
        return (with_loras(model, chosen),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoLoraSelect,
    WanVideoLoraSelectByName,
    WanVideoLoraSelectMulti,
    WanVideoLoraBlockEdit,
    WanVideoSetLoRAs,
)
