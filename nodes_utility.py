"""Small nodes around the sampler."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .node_tools import CATEGORY, Inputs, mappings
from .wanvideo.images import to_unit

EASES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "ease_in": lambda t: t * t,
    "ease_out": lambda t: t * (2 - t),
}


PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.01}
STEPS = ("INT", {"default": 30, "min": 2, "max": 1000, "step": 1, "tooltip": "Those of the sampler"})
RANGE = {
    "interpolation": (list(EASES), {"default": "linear", "tooltip": "How the value goes from start to end"}),
    "start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": "Share of the steps before the range"}),
    "end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": "Share of the steps when it ends"}),
}


class CreateCFGScheduleFloatList:
    """A cfg value for every step: from start to end inside the range, 1.0 outside it."""

    DISPLAY_NAME = "Create CFG Schedule Float List"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("FLOAT",)
    RETURN_NAMES = ("float_list",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 5.0, "min": 0.0, "max": 30.0, "step": 0.01, "round": 0.01}
        return {
            "required": {
                "steps": STEPS,
                "cfg_scale_start": ("FLOAT", {**scale, "tooltip": "At the first step of the range"}),
                "cfg_scale_end": ("FLOAT", {**scale, "tooltip": "At the last step of the range"}),
                **RANGE,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def process(
        self,
        steps: int,
        cfg_scale_start: float,
        cfg_scale_end: float,
        interpolation: str,
        start_percent: float,
        end_percent: float,
        unique_id: str | None = None,
    ) -> tuple[list[float]]:
        """The list; the first step stays 1.0 where the range starts later."""
        ends, part = (cfg_scale_start, cfg_scale_end), (start_percent, end_percent)
        return (_eased(steps, ends, part, otherwise=1.0, interpolation=interpolation),)


def _eased(
    steps: int, ends: tuple[float, float], part: tuple[float, float], *, otherwise: float, interpolation: str
) -> list[float]:
    """A value a step: from end to end within the part (shares of the steps), `otherwise` outside of it.

    The first step is outside wherever the part starts later, also where that share is less than a step.
    """
    first, last = (min(int(steps * percent), steps - 1) for percent in part)
    values = [otherwise] * steps
    for index in range(first, last + 1):
        share = EASES[interpolation]((index - first) / (last - first) if last > first else 0.0)
        values[index] = round(ends[0] + share * (ends[1] - ends[0]), 2)
    if part[0] > 0:
        values[0] = otherwise
    return values


class CreateScheduleFloatList:
    """A value for every step: from start to end inside the range, the default outside it."""

    DISPLAY_NAME = "Create Schedule Float List"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("FLOAT",)
    RETURN_NAMES = ("float_list",)
    DESCRIPTION = "Makes a list with one value for each step, for inputs that take one: cfg, or the strength of a LoRA."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        value = {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.01, "round": 0.01}
        outside = {**value, "default": 0.0, "max": 1000.0, "tooltip": "In the steps before and after the range"}
        return {
            "required": {
                "steps": STEPS,
                "start_value": ("FLOAT", {**value, "tooltip": "At the first step of the range"}),
                "end_value": ("FLOAT", {**value, "tooltip": "At the last step of the range"}),
                "default_value": ("FLOAT", outside),
                **RANGE,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def process(
        self,
        steps: int,
        start_value: float,
        end_value: float,
        default_value: float,
        interpolation: str,
        start_percent: float,
        end_percent: float,
        unique_id: str | None = None,
    ) -> tuple[list[float]]:
        """The list."""
        ends, part = (start_value, end_value), (start_percent, end_percent)
        return (_eased(steps, ends, part, otherwise=default_value, interpolation=interpolation),)


class WanVideoPassImagesFromSamples:
    """The frames, or the folder of frames, that the talking-video loop made."""

    DISPLAY_NAME = "WanVideo Pass Images From Samples"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "output_path")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"samples": ("LATENT", {"tooltip": "From a sampler that decoded while it ran"})}}

    def decode(self, samples: dict[str, object]) -> tuple[Tensor, str]:
        """IMAGE in 0..1 and the folder ("" if there is none)."""
        video = samples.get("video")
        if video is None:
            raise ValueError(
                "These samples hold no frames: connect a sampler whose image_embeds come from 'WanVideo Long I2V "
                "Multi/InfiniteTalk', or use WanVideoDecode."
            )
        return to_unit(video), str(samples.get("output_path", ""))


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    CreateCFGScheduleFloatList,
    CreateScheduleFloatList,
    WanVideoPassImagesFromSamples,
)
