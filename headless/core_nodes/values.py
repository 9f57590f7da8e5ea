"""Constants, seeds and previews."""

from __future__ import annotations

import hashlib
import json
import logging

from ...node_tools import Inputs

log = logging.getLogger("wanvideo")

LIMIT = 0xFFFFFFFFFFFFFFFF
LARGEST_SEED = 2**50
ANY = "*"

Shown = dict[str, dict[str, list[str]]]


def constant(kind: str, name: str = "value", **options: object) -> type:
    """A node class with one widget, of this name and type, whose value is its output."""

    class Constant:
        FUNCTION = "get_value"
        RETURN_TYPES = (kind,)

        @classmethod
        def INPUT_TYPES(cls) -> Inputs:
            return {"required": {name: (kind, options)}}

        def get_value(self, **values: object) -> tuple[object]:
            """The value."""
            return (values[name],)

    return Constant


class SeedRgthree:
    """A seed; below 0 one that is made of the workflow, so that all processes of a run have the same."""

    FUNCTION = "main"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"seed": ("INT", {"default": 0, "min": -LARGEST_SEED, "max": LARGEST_SEED})},
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    def main(self, seed: int, prompt: object = None, unique_id: str = "") -> tuple[int]:
        """The seed. In ComfyUI -1, -2 and -3 ask for another one in each run."""
        if seed >= 0:
            return (seed,)
        text = json.dumps([unique_id, prompt], sort_keys=True, default=repr)
        made = int(hashlib.sha256(text.encode()).hexdigest(), 16) % LARGEST_SEED
        log.info(
            "Seed #%s: any seed is asked for; %d is taken. --set %s.seed=N takes another.", unique_id, made, unique_id
        )
        return (made,)


class MxSlider:
    """A number of a slider, with a fraction or without."""

    FUNCTION = "main"
    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        limits = {"min": -LIMIT, "max": LIMIT}
        return {
            "required": {
                "Xi": ("INT", {"default": 20, **limits}),
                "Xf": ("FLOAT", {"default": 20.0, **limits}),
                "isfloatX": ("INT", {"default": 0, "min": 0, "max": 1}),
            }
        }

    def main(self, Xi: int, Xf: float, isfloatX: int) -> tuple[float]:  # noqa: N803
        """Xf where isfloatX is 1, else Xi."""
        return (Xf if isfloatX else Xi,)


class PreviewAny:
    """Shows a value as text."""

    FUNCTION = "main"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"source": (ANY, {})}}

    def main(self, source: object) -> Shown:
        """Its text."""
        return {"ui": {"text": [str(source)]}}


WHOLE = {"default": 0, "min": -LIMIT, "max": LIMIT}
FRACTION = {"default": 0.0, "min": -LIMIT, "max": LIMIT, "step": 0.00001}
TEXT = {"default": "", "multiline": True}

NODE_CLASS_MAPPINGS = {
    "INTConstant": constant("INT", **WHOLE),
    "FloatConstant": constant("FLOAT", **FRACTION),
    "StringConstant": constant("STRING", "string", default=""),
    "PrimitiveInt": constant("INT", **WHOLE, control_after_generate=True),
    "PrimitiveFloat": constant("FLOAT", **FRACTION),
    "PrimitiveString": constant("STRING", default=""),
    "PrimitiveStringMultiline": constant("STRING", **TEXT),
    "PrimitiveBoolean": constant("BOOLEAN", default=False),
    "ImpactInt": constant("INT", **WHOLE),
    "ImpactFloat": constant("FLOAT", **FRACTION),
    "Int": constant("INT", "Number", **WHOLE),
    "easy int": constant("INT", **WHOLE),
    "SimpleMathInt+": constant("INT", **WHOLE),
    "SimpleMathFloat+": constant("FLOAT", **FRACTION),
    "Text Multiline": constant("STRING", "text", **TEXT),
    "Text Prompt (JPS)": constant("STRING", "text", **TEXT),
    "Seed (rgthree)": SeedRgthree,
    "mxSlider": MxSlider,
    "PreviewAny": PreviewAny,
}
