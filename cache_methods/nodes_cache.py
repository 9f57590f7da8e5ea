"""Nodes of the step caches."""

from __future__ import annotations

from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.step_cache import CACHE_DEVICES, StepCache
from .easycache import EasyCache
from .magcache import MagCache
from .teacache import MODES, TeaCache


def _widgets(start_step: int) -> dict[str, tuple[object, ...]]:
    """The widgets that all methods share."""
    return {
        "start_step": (
            "INT",
            {"default": start_step, "min": 0, "max": 9999, "step": 1, "tooltip": "First step that may be left out"},
        ),
        "end_step": (
            "INT",
            {"default": -1, "min": -1, "max": 9999, "step": 1, "tooltip": "Last step that may be left out; -1: any"},
        ),
        "cache_device": (
            list(CACHE_DEVICES),
            {"default": "offload_device", "tooltip": "main_device is faster and takes GPU memory"},
        ),
    }


class _CacheNode:
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CACHEARGS",)
    RETURN_NAMES = ("cache_args",)


class WanVideoTeaCache(_CacheNode):
    """Leaves out steps where the time embedding hardly changes."""

    DISPLAY_NAME = "WanVideo TeaCache"
    FUNCTION = "process"
    DESCRIPTION = "TeaCache (https://github.com/ali-vilab/TeaCache): 0.05 to 0.08 suits 1.3B, 0.15 to 0.3 suits 14B."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "Higher leaves out more steps; without coefficients a tenth of it does the same"
        return {
            "required": {
                "rel_l1_thresh": ("FLOAT", {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": tip}),
                **_widgets(1),
                "use_coefficients": ("BOOLEAN", {"default": True, "tooltip": "Use the polynomial of the model"}),
            },
            "optional": {"mode": (list(MODES), {"default": "e", "tooltip": "Time embedding, or its projection"})},
        }

    def process(
        self,
        rel_l1_thresh: float,
        start_step: int,
        end_step: int,
        cache_device: str,
        use_coefficients: bool,
        mode: str = "e",
    ) -> tuple[StepCache]:
        """The settings."""
        cache = TeaCache(
            threshold=rel_l1_thresh,
            start_step=start_step,
            end_step=end_step,
            cache_device=cache_device,
            use_coefficients=use_coefficients,
            mode=mode,
        )
        return (cache,)


class WanVideoMagCache(_CacheNode):
    """Leaves out steps where the curve of change sizes is flat."""

    DISPLAY_NAME = "WanVideo MagCache"
    FUNCTION = "setargs"
    EXPERIMENTAL = True
    DESCRIPTION = "MagCache (https://github.com/Zehong-Ma/MagCache)."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        threshold = {"default": 0.02, "min": 0.0, "max": 0.3, "step": 0.001, "tooltip": "Higher leaves out more steps"}
        longest = {"default": 4, "min": 0, "max": 6, "step": 1, "tooltip": "Most steps left out in a row"}
        return {
            "required": {"magcache_thresh": ("FLOAT", threshold), "magcache_K": ("INT", longest), **_widgets(1)},
        }

    def setargs(
        self,
        magcache_thresh: float,
        magcache_K: int,
        start_step: int,
        end_step: int,
        cache_device: str,  # noqa: N803
    ) -> tuple[StepCache]:
        """The settings."""
        cache = MagCache(
            threshold=magcache_thresh,
            longest=magcache_K,
            start_step=start_step,
            end_step=end_step,
            cache_device=cache_device,
        )
        return (cache,)


class WanVideoEasyCache(_CacheNode):
    """Leaves out steps whose change it can predict from the steps before."""

    DISPLAY_NAME = "WanVideo EasyCache"
    FUNCTION = "setargs"
    EXPERIMENTAL = True
    DESCRIPTION = (
        "EasyCache (https://github.com/H-EmbodVis/EasyCache): for any model; made for runs of 20 steps or more."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        threshold = {"default": 0.015, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "Higher leaves out more steps"}
        return {"required": {"easycache_thresh": ("FLOAT", threshold), **_widgets(10)}}

    def setargs(self, easycache_thresh: float, start_step: int, end_step: int, cache_device: str) -> tuple[StepCache]:
        """The settings."""
        cache = EasyCache(
            threshold=easycache_thresh, start_step=start_step, end_step=end_step, cache_device=cache_device
        )
        return (cache,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoTeaCache, WanVideoMagCache, WanVideoEasyCache)
