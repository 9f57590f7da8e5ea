"""Sizes of pictures, asked for and changed (ComfyUI, ComfyUI_essentials)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...node_tools import Inputs
from ...wanvideo.images import centered, resize_images

METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
LARGEST = 16384
CONDITIONS = ["always", "downscale if bigger", "upscale if smaller", "if bigger area", "if smaller area"]


def scaled_to(images: Tensor, method: str, width: int, height: int, crop: str) -> Tensor:
    """As `resize_images`. crop center: what the new proportions have no room for is cut off both sides alike."""
    part = centered(images, width, height) if crop == "center" else images
    return resize_images(part, width, height, method)


class ImageScale:
    """Pictures at another size; one side of 0 keeps the proportions, both leave them as they are."""

    FUNCTION = "upscale"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = ("INT", {"default": 512, "min": 0, "max": LARGEST, "step": 1})
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (METHODS,),
                "width": side,
                "height": side,
                "crop": (["disabled", "center"],),
            }
        }

    def upscale(self, image: Tensor, upscale_method: str, width: int, height: int, crop: str) -> tuple[Tensor]:
        """The pictures at that size."""
        high, wide = image.shape[1:3]
        if not width and not height:
            return (image,)
        width = width or max(1, round(wide * height / high))
        height = height or max(1, round(high * width / wide))
        return (scaled_to(image, upscale_method, width, height, crop),)


class ImageScaleBy:
    """Pictures larger or smaller by a factor."""

    FUNCTION = "upscale"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        factor = ("FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01})
        return {"required": {"image": ("IMAGE",), "upscale_method": (METHODS,), "scale_by": factor}}

    def upscale(self, image: Tensor, upscale_method: str, scale_by: float) -> tuple[Tensor]:
        """Both sides rounded."""
        height, width = (max(1, round(side * scale_by)) for side in image.shape[1:3])
        return (resize_images(image, width, height, upscale_method),)


class ImageResizeEssentials:
    """Pictures brought to a size, or left as they are where the condition does not hold (ImageResize+)."""

    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = ("INT", {"default": 512, "min": 0, "max": LARGEST, "step": 1})
        return {
            "required": {
                "image": ("IMAGE",),
                "width": side,
                "height": side,
                "interpolation": (["nearest", "bilinear", "bicubic", "area", "nearest-exact", "lanczos"],),
                "method": (["stretch", "keep proportion", "fill / crop", "pad"],),
                "condition": (CONDITIONS,),
                "multiple_of": ("INT", {"default": 0, "min": 0, "max": 512, "step": 1}),
            }
        }

    def execute(
        self,
        image: Tensor,
        width: int,
        height: int,
        interpolation: str = "nearest",
        method: str = "stretch",
        condition: str = "always",
        multiple_of: int = 0,
    ) -> tuple[Tensor, int, int]:
        """The pictures, their width and height. multiple_of: width, height, and the result, are cut to multiples."""
        step = max(multiple_of, 1)
        goal = width // step * step, height // step * step
        size, frame = _placed(image.shape[2], image.shape[1], goal, method)
        if _holds(condition, (image.shape[2], image.shape[1]), size):
            image = _framed(resize_images(image, *size, interpolation), frame)
        high, wide = (side // step * step for side in image.shape[1:3])
        image = _framed(image, (wide, high)).clamp(0, 1)
        return image, wide, high


def _placed(wide: int, high: int, goal: tuple[int, int], method: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(size to scale to, size to cut or pad that to), width first. A side of 0 in the goal is left to the other one."""
    if method == "stretch":
        size = goal[0] or wide, goal[1] or high
        return size, size
    fill = method.startswith("fill")
    if fill:
        goal = goal[0] or wide, goal[1] or high
    ratios = [new / old for new, old in zip(goal, (wide, high), strict=True) if new]
    ratio = max(ratios) if fill else min(ratios, default=1.0)
    size = round(wide * ratio), round(high * ratio)
    frame = size if method == "keep proportion" else (goal[0] or size[0], goal[1] or size[1])
    return size, frame


def _holds(condition: str, old: tuple[int, int], new: tuple[int, int]) -> bool:
    more = old[0] * old[1] - new[0] * new[1]
    return {
        "always": True,
        "downscale if bigger": old[0] > new[0] or old[1] > new[1],
        "upscale if smaller": old[0] < new[0] or old[1] < new[1],
        "if bigger area": more > 0,
        "if smaller area": more < 0,
    }[condition]


def _framed(images: Tensor, frame: tuple[int, int]) -> Tensor:
    """The middle of the images, or the images in the middle of black, at this width and height."""
    padding = [0, 0]
    for wanted, side in zip(frame, images.shape[2:0:-1], strict=True):
        before = int((wanted - side) / 2)
        padding += [before, wanted - side - before]
    return torch.nn.functional.pad(images, padding)


class GetImageSize:
    """Width, height and number of pictures."""

    FUNCTION = "get_size"
    RETURN_TYPES = ("INT", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("IMAGE",)}}

    def get_size(self, image: Tensor) -> tuple[int, int, int]:
        """In this order."""
        return image.shape[2], image.shape[1], image.shape[0]


class ImageFromBatchEssentials:
    """Some of a batch's pictures (ImageFromBatch+)."""

    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": ("IMAGE",),
                "start": ("INT", {"default": 0, "min": 0, "step": 1}),
                "length": ("INT", {"default": -1, "min": -1, "step": 1}),
            }
        }

    def execute(self, image: Tensor, start: int, length: int) -> tuple[Tensor]:
        """`length` pictures, or all that follow (-1), from `start` on, which is the last one at most."""
        first = min(start, len(image) - 1)
        return (image[first:] if length < 0 else image[first : first + length],)


NODE_CLASS_MAPPINGS = {
    "ImageScale": ImageScale,
    "ImageScaleBy": ImageScaleBy,
    "ImageResize+": ImageResizeEssentials,
    "ImageFromBatch+": ImageFromBatchEssentials,
    "GetImageSize": GetImageSize,
    "GetImageSize+": GetImageSize,
}
