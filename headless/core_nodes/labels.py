"""Words beside pictures (KJNodes)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from ...node_tools import Inputs

LARGEST = 4096
DIRECTIONS = ["up", "down", "left", "right", "overlay"]


class AddLabel:
    """A bar with words at one side of pictures, or words upon them. The font is Pillow's own, whatever `font` names."""

    FUNCTION = "addlabel"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": ("IMAGE",),
                "text_x": ("INT", {"default": 10, "min": 0, "max": LARGEST, "step": 1}),
                "text_y": ("INT", {"default": 2, "min": 0, "max": LARGEST, "step": 1}),
                "height": ("INT", {"default": 48, "min": -1, "max": LARGEST, "step": 1}),
                "font_size": ("INT", {"default": 32, "min": 1, "max": LARGEST, "step": 1}),
                "font_color": ("STRING", {"default": "white"}),
                "label_color": ("STRING", {"default": "black"}),
                "font": ("STRING", {"default": "FreeMono.ttf"}),
                "text": ("STRING", {"default": "Text"}),
                "direction": (DIRECTIONS, {"default": "up"}),
            },
            "optional": {"caption": ("STRING", {"default": ""})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, font_color: str, label_color: str) -> bool:
        """Colors that have a name, or #rrggbb."""
        for color in (font_color, label_color):
            _rgb(color)
        return True

    def addlabel(
        self,
        image: Tensor,
        text_x: int,
        text_y: int,
        height: int,
        font_size: int,
        font_color: str,
        label_color: str,
        font: str,
        text: str,
        direction: str,
        caption: str = "",
    ) -> tuple[Tensor]:
        """Pictures with the bar; left and right it is as wide as `height`. A caption takes the place of the text."""
        words, typeface = caption or text, ImageFont.load_default(font_size)
        thickness = height if height >= 0 else font_size + 2 * text_y
        rows, columns = image.shape[1:3]
        lies, stands = direction in ("up", "down"), direction in ("left", "right")
        ink = Image.new("L", (thickness if stands else columns, thickness if lies else rows), 0)
        ImageDraw.Draw(ink).text((text_x, text_y), words, fill=255, font=typeface)
        share = torch.from_numpy(np.array(ink)).to(image).div(255)[..., None]
        paint, ground = (torch.tensor(_rgb(color)).to(image) / 255 for color in (font_color, label_color))
        colors = image[..., :3]
        if direction == "overlay":
            return (torch.lerp(colors, paint, share),)
        bar = torch.lerp(ground, paint, share).expand(len(image), -1, -1, -1)
        parts = (bar, colors) if direction in ("up", "left") else (colors, bar)
        return (torch.cat(parts, dim=1 if lies else 2),)


def _rgb(color: str) -> tuple[int, int, int]:
    """Raises ValueError for what is no color."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ValueError(f"'{color}' is no color; write a name such as white, or #rrggbb.") from error


NODE_CLASS_MAPPINGS = {"AddLabel": AddLabel}
