"""The node of Pusa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.guidance import per_step
from ..wanvideo.request import ImageEmbeds
from .noise import FrameNoise


class WanVideoAddPusaNoise:
    """Noise on frames that are given, for Pusa models."""

    DISPLAY_NAME = "WanVideo Add Pusa Noise"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "Lets extra latents change with the video, which otherwise holds them: they keep a part of every step's "
        "noise. For Pusa models with the scheduler flowmatch_pusa."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        parts = "Part of each step's noise that given frames keep, up to 1; 0 holds them. A list: one for each"
        steps = "How many steps noise is mixed in; -1 for all"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "With extra_latents, of WanVideoEmptyEmbeds for example"}),
                "noise_multipliers": (
                    "FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": parts}
                ),
                "noisy_steps": ("INT", {"default": -1, "min": -1, "max": 1000, "tooltip": steps}),
            }
        }  # fmt: skip

    def add(
        self, embeds: ImageEmbeds, noise_multipliers: float | Sequence[float], noisy_steps: int
    ) -> tuple[ImageEmbeds]:
        """The embeds with noise on given frames, in the place of earlier noise. Raises ValueError for parts above 1."""
        parts = per_step(noise_multipliers)
        if not all(0 <= part <= 1 for part in parts):
            raise ValueError(
                f"noise_multipliers are parts of a step's noise, 0 to 1, but one is {max(parts, key=abs):g}: a frame "
                "cannot be noisier than the video."
            )
        others = tuple(modifier for modifier in embeds.modifiers if not isinstance(modifier, FrameNoise))
        return (replace(embeds, modifiers=(*others, FrameNoise(parts, noisy_steps))),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddPusaNoise)
