"""Values that come from elsewhere in the graph: switches, widgets of other nodes, shown text, drawn splines."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ...node_tools import Inputs
from .values import ANY

Point = dict[str, float]


class LazySwitchKJ:
    """One of two inputs; what the other one needs does not run."""

    FUNCTION = "switch"
    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"switch": ("BOOLEAN", {"default": False})},
            "optional": {"on_false": (ANY,), "on_true": (ANY,)},
        }

    @classmethod
    def UNUSED_INPUTS(cls, values: Mapping[str, object]) -> tuple[str, ...]:
        """The input that is not chosen, where the widget itself chooses."""
        switch = values.get("switch", False)
        return ("on_false" if switch else "on_true",) if isinstance(switch, bool) else ()

    def switch(self, switch: bool, on_false: object = None, on_true: object = None) -> tuple[object]:
        """The chosen value."""
        return (on_true if switch else on_false,)


class AnySwitch:
    """The first of its inputs that has a value (rgthree)."""

    FUNCTION = "switch"
    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {}}

    @classmethod
    def EXTRA_INPUTS(cls, values: Mapping[str, object]) -> dict[str, tuple[object, ...]]:
        """any_01, any_02, ..., as many as are connected."""
        return {name: (ANY,) for name in values if name.startswith("any_")}

    def switch(self, **values: object) -> tuple[object]:
        """The value; None where there is none."""
        return (next((value for value in values.values() if value is not None), None),)


def passing(name: str) -> type:
    """A node class that hands its input of this name on: what else the node does concerns ComfyUI alone."""

    class Passing:
        FUNCTION = "passed"
        RETURN_TYPES = (ANY,)

        @classmethod
        def INPUT_TYPES(cls) -> Inputs:
            return {"required": {name: (ANY,)}}

        def passed(self, **values: object) -> tuple[object]:
            """The same."""
            return (values[name],)

    return Passing


class WidgetToString:
    """The value of another node's widget as text; the node is the linked one, or that of an id or a title."""

    FUNCTION = "get_widget_value"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "id": ("INT", {"default": 0, "min": 0, "max": 100000, "step": 1}),
                "widget_name": ("STRING", {"multiline": False}),
                "return_all": ("BOOLEAN", {"default": False}),
            },
            "optional": {
                "any_input": (ANY,),
                "node_title": ("STRING", {"multiline": False}),
                "allowed_float_decimals": ("INT", {"default": 2, "min": 0, "max": 10}),
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    def get_widget_value(
        self,
        id: int,
        widget_name: str,
        return_all: bool = False,
        any_input: object = None,
        node_title: str = "",
        allowed_float_decimals: int = 2,
        prompt: Mapping[str, Mapping[str, object]] | None = None,
        unique_id: str = "",
    ) -> tuple[str]:
        """The value alone; "name: value" pairs for several names between commas, or for all widgets."""
        key = self._chosen(prompt, unique_id, id, node_title)
        saved = {name: value for name, value in prompt[key]["inputs"].items() if not isinstance(value, list)}
        names = list(saved) if return_all else [name.strip() for name in widget_name.split(",") if name.strip()]
        absent = [name for name in names if name not in saved]
        if absent or not names:
            raise ValueError(
                f"The node #{key} has no widget '{', '.join(absent)}'; its widgets are {', '.join(saved) or 'none'}."
            )

        def text(value: object) -> str:
            return f"{value:.{allowed_float_decimals}f}" if isinstance(value, float) else str(value)

        if len(names) == 1 and not return_all:
            return (text(saved[names[0]]),)
        return (", ".join(f"{name}: {text(saved[name])}" for name in names),)

    @staticmethod
    def _chosen(prompt: Mapping[str, Mapping[str, object]], own: str, number: int, title: str) -> str:
        """The id of the node that is asked."""
        link = prompt[own]["inputs"].get("any_input")
        titled = [key for key, node in prompt.items() if title and node["_meta"]["title"] == title]
        # Ids inside of a subgraph begin with the subgraph's.
        numbered = [f"{own.rpartition(':')[0]}:{number}".removeprefix(":"), str(number)] if number else []
        wanted = numbered or titled or ([link[0]] if isinstance(link, list) else [])
        key = next((key for key in wanted if key in prompt), None)
        if key is None:
            raise ValueError(
                f"WidgetToString #{own} finds no node{f' #{number}' * bool(number)} to ask: link any_input to it."
            )
        return key


class ShowText:
    """Shows a text and passes it on (ShowText|pysssss)."""

    FUNCTION = "notify"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def notify(self, text: str) -> dict[str, object]:
        """The text."""
        return {"ui": {"text": [text]}, "result": (text,)}


class SplineEditor:
    """Points along splines, as the editor sampled them when the graph was saved."""

    FUNCTION = "splinedata"
    RETURN_TYPES = ("MASK", "STRING", "FLOAT", "INT", "STRING")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 8, "max": 4096, "step": 8}
        limit = {"min": -10000.0, "max": 10000.0, "step": 0.01}
        return {
            "required": {
                "points_store": ("STRING", {"multiline": False}),
                "coordinates": ("STRING", {"multiline": False}),
                "mask_width": ("INT", side),
                "mask_height": ("INT", side),
                "points_to_sample": ("INT", {"default": 16, "min": 2, "max": 1000, "step": 1}),
                "sampling_method": (["path", "time", "controlpoints", "speed"], {"default": "time"}),
                "interpolation": ("STRING", {"default": "cardinal"}),
                "tension": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
                "repeat_output": ("INT", {"default": 1, "min": 1, "max": 4096, "step": 1}),
                "float_output_type": (["list", "pandas series", "tensor"], {"default": "list"}),
            },
            "optional": {
                "min_value": ("FLOAT", {"default": 0.0, **limit}),
                "max_value": ("FLOAT", {"default": 1.0, **limit}),
                "bg_image": ("IMAGE",),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, coordinates: str, float_output_type: str) -> bool | str:
        """Points, and a type of list that is built."""
        _splines(coordinates)
        return float_output_type != "pandas series" or "float_output_type 'pandas series' is not built: use list."

    def splinedata(
        self,
        points_store: str,
        coordinates: str,
        mask_width: int,
        mask_height: int,
        points_to_sample: int,
        sampling_method: str,
        interpolation: str,
        tension: float,
        repeat_output: int,
        float_output_type: str,
        min_value: float = 0.0,
        max_value: float = 1.0,
        bg_image: Tensor | None = None,
    ) -> tuple[Tensor, str, list[float] | Tensor, int, str]:
        """Masks as bright as the last spline is high, all points as JSON, heights, points of a spline, shares as JSON.

        points_to_sample, sampling_method, interpolation and tension have acted when the points were saved.
        """
        splines = _splines(coordinates)

        def share(place: float) -> float:
            """From max_value at the top (or left) to min_value; both axes by the height, as in the editor."""
            return (1.0 - place / mask_height) * (max_value - min_value) + min_value

        shares = [[{"x": share(p["x"]), "y": share(p["y"])} for p in spline] for spline in splines]
        every = [point for spline in shares for point in spline]
        heights = [point["y"] for point in every] * repeat_output
        bright = torch.tensor([point["y"] for point in shares[-1]] or [min_value]).repeat(repeat_output)
        masks = bright[:, None, None].expand(-1, mask_height, mask_width)
        floats = torch.tensor(heights) if float_output_type == "tensor" else heights
        points = splines if len(splines) > 1 else splines[0]
        return masks, json.dumps(points), floats, len(splines[0]), json.dumps(every)


def _splines(coordinates: str) -> list[list[Point]]:
    """Whole pixels of each spline. Raises ValueError for what the editor does not write."""
    try:
        saved = json.loads(coordinates)
        nested = saved if isinstance(saved[0], list) else [saved]
        return [[{axis: round(point[axis]) for axis in ("x", "y")} for point in spline] for spline in nested]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError("'coordinates' holds no points of a spline: draw it and save the graph.") from error


NODE_CLASS_MAPPINGS = {
    "LazySwitchKJ": LazySwitchKJ,
    "Any Switch (rgthree)": AnySwitch,
    "ImagePass": passing("image"),
    "easy cleanGpuUsed": passing("anything"),
    "UnloadModel": passing("value"),
    "UnloadAllModels": passing("value"),
    "WidgetToString": WidgetToString,
    "ShowText|pysssss": ShowText,
    "SplineEditor": SplineEditor,
}
