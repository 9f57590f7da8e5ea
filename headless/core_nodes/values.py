"""Constants and previews."""

from __future__ import annotations

from ...node_tools import Inputs

LIMIT = 0xFFFFFFFFFFFFFFFF
ANY = "*"

Shown = dict[str, dict[str, list[str]]]


class INTConstant:
    """A whole number."""

    FUNCTION = "get_value"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"value": ("INT", {"default": 0, "min": -LIMIT, "max": LIMIT})}}

    def get_value(self, value: int) -> tuple[int]:
        """The number."""
        return (value,)


class FloatConstant:
    """A number."""

    FUNCTION = "get_value"
    RETURN_TYPES = ("FLOAT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"value": ("FLOAT", {"default": 0.0, "min": -LIMIT, "max": LIMIT, "step": 0.00001})}}

    def get_value(self, value: float) -> tuple[float]:
        """The number."""
        return (value,)


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


NODE_CLASS_MAPPINGS = {"INTConstant": INTConstant, "FloatConstant": FloatConstant, "PreviewAny": PreviewAny}
