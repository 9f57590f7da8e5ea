"""The node of normalized attention guidance."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.request import TextEmbeds
from .extension import NegativeText


class WanVideoApplyNAG:
    """Adds a negative prompt that acts within attention, where CFG is off or beside it."""

    DISPLAY_NAME = "WanVideo Apply NAG"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)
    DESCRIPTION = (
        "Normalized attention guidance (https://github.com/ChenDarYen/Normalized-Attention-Guidance): a negative "
        "prompt without a second pass, for models that run at cfg 1."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 11.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "How far from the negative prompt"}
        tau = {"default": 2.5, "min": 0.0, "max": 10.0, "step": 0.1, "tooltip": "How many times larger it may get"}
        alpha = {"default": 0.25, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "How much of it is blended in"}
        inplace = {"default": True, "tooltip": "Less memory; results differ by rounding"}
        return {
            "required": {
                "original_text_embeds": ("WANVIDEOTEXTEMBEDS", {"tooltip": "The prompts that are guided"}),
                "nag_text_embeds": ("WANVIDEOTEXTEMBEDS", {"tooltip": "The prompt to stay away from, as positive one"}),
                "nag_scale": ("FLOAT", scale),
                "nag_tau": ("FLOAT", tau),
                "nag_alpha": ("FLOAT", alpha),
            },
            "optional": {"inplace": ("BOOLEAN", inplace)},
        }

    def process(
        self,
        original_text_embeds: TextEmbeds,
        nag_text_embeds: TextEmbeds,
        nag_scale: float,
        nag_tau: float,
        nag_alpha: float,
        inplace: bool = True,
    ) -> tuple[TextEmbeds]:
        """The same embeds with guidance; one that they had already is replaced."""
        if not nag_text_embeds.positive:
            raise ValueError("nag_text_embeds hold no prompt: connect the embeds of the prompt to stay away from.")
        others = tuple(p for p in original_text_embeds.payloads if not isinstance(p, NegativeText))
        scale, tau, alpha = (torch.tensor(float(value)) for value in (nag_scale, nag_tau, nag_alpha))
        guidance = NegativeText(nag_text_embeds.positive, scale, tau, alpha, inplace)
        return (replace(original_text_embeds, payloads=(*others, guidance)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoApplyNAG)
