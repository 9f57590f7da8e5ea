"""Masks, and pictures through masks (ComfyUI and KJNodes)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...node_tools import Inputs
from .borders import to_color, with_borders
from .pictures import LARGEST

CHANNELS = ["red", "green", "blue", "alpha"]


class ImageToMask:
    """One channel of pictures as a mask."""

    FUNCTION = "image_to_mask"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("IMAGE",), "channel": (CHANNELS,)}}

    def image_to_mask(self, image: Tensor, channel: str) -> tuple[Tensor]:
        """MASK [n, H, W]."""
        index = CHANNELS.index(channel)
        if index >= image.shape[-1]:
            raise ValueError(f"The picture has no channel '{channel}', only {image.shape[-1]}; choose red.")
        return (image[..., index],)


class MaskToImage:
    """Masks as gray pictures."""

    FUNCTION = "mask_to_image"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mask": ("MASK",)}}

    def mask_to_image(self, mask: Tensor) -> tuple[Tensor]:
        """IMAGE [n, H, W, 3]."""
        return (mask.reshape(-1, *mask.shape[-2:], 1).expand(-1, -1, -1, 3),)


class InvertMask:
    """What was in is out."""

    FUNCTION = "invert"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mask": ("MASK",)}}

    def invert(self, mask: Tensor) -> tuple[Tensor]:
        """1 - mask."""
        return (1 - mask,)


class GrowMask:
    """Grows masks by a number of pixels, or shrinks them by a negative one."""

    FUNCTION = "expand_mask"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "mask": ("MASK",),
                "expand": ("INT", {"default": 0, "min": -LARGEST, "max": LARGEST, "step": 1}),
                "tapered_corners": ("BOOLEAN", {"default": True}),
            }
        }

    def expand_mask(self, mask: Tensor, expand: int, tapered_corners: bool) -> tuple[Tensor]:
        """Each pixel the largest (smallest) of its neighbors, `expand` times; tapered: without the diagonal ones."""
        grown = mask.reshape(-1, 1, *mask.shape[-2:])
        sign = 1 if expand >= 0 else -1
        grown = grown * sign
        # Farther than the picture is wide, nothing changes any more.
        for _ in range(min(abs(expand), sum(mask.shape[-2:]))):
            if tapered_corners:
                across = functional.max_pool2d(grown, (1, 3), stride=1, padding=(0, 1))
                grown = torch.maximum(across, functional.max_pool2d(grown, (3, 1), stride=1, padding=(1, 0)))
            else:
                grown = functional.max_pool2d(grown, 3, stride=1, padding=1)
        return ((grown * sign)[:, 0],)


class GetMaskSizeAndCount:
    """Width, height and number of masks."""

    FUNCTION = "getsize"
    RETURN_TYPES = ("MASK", "INT", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mask": ("MASK",)}}

    def getsize(self, mask: Tensor) -> tuple[Tensor, int, int, int]:
        """The masks and their sizes."""
        return mask, mask.shape[2], mask.shape[1], mask.shape[0]


class ImageCompositeMasked:
    """Lays pictures over others at a place, where a mask is 1."""

    FUNCTION = "composite"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        place = {"default": 0, "min": 0, "max": LARGEST, "step": 1}
        return {
            "required": {
                "destination": ("IMAGE",),
                "source": ("IMAGE",),
                "x": ("INT", place),
                "y": ("INT", place),
                "resize_source": ("BOOLEAN", {"default": False}),
            },
            "optional": {"mask": ("MASK",)},
        }

    def composite(
        self, destination: Tensor, source: Tensor, x: int, y: int, resize_source: bool, mask: Tensor | None = None
    ) -> tuple[Tensor]:
        """Batches that are shorter than the destination start over; what lies beyond its borders is cut off."""
        channels = min(destination.shape[-1], source.shape[-1])
        result, count = destination[..., :channels].clone(), len(destination)
        height, width = result.shape[1:3]
        source = source[..., :channels]
        if resize_source:
            source = _scaled(source, height, width)
        weight = torch.ones_like(source[..., :1]) if mask is None else _masks(mask, *source.shape[1:3])
        high, wide = min(source.shape[1], height - y), min(source.shape[2], width - x)
        if high <= 0 or wide <= 0:
            return (result,)
        over, weight = (_cycled(part, count)[:, :high, :wide] for part in (source, weight))
        below = result[:, y : y + high, x : x + wide]
        result[:, y : y + high, x : x + wide] = over * weight + below * (1 - weight)
        return (result,)


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(images.movedim(-1, 1), size=(height, width), mode="bilinear").movedim(1, -1)


def _masks(mask: Tensor, height: int, width: int) -> Tensor:
    return _scaled(mask.reshape(-1, *mask.shape[-2:], 1), height, width)


def _cycled(batch: Tensor, count: int) -> Tensor:
    return batch[torch.arange(count) % len(batch)]


class ImageBlur:
    """Blurs pictures; the kernel spans blur_radius pixels to each side, and sigma is a share of that."""

    FUNCTION = "blur"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": ("IMAGE",),
                "blur_radius": ("INT", {"default": 1, "min": 1, "max": 31, "step": 1}),
                "sigma": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.1}),
            }
        }

    def blur(self, image: Tensor, blur_radius: int, sigma: float) -> tuple[Tensor]:
        """A Gaussian, first across and then down; the picture is mirrored at its borders."""
        if min(image.shape[1:3]) <= blur_radius:
            raise ValueError(f"blur_radius {blur_radius} must be less than the picture's sides; choose a smaller one.")
        weights = torch.exp(-(torch.linspace(-1, 1, 2 * blur_radius + 1) ** 2) / (2 * sigma**2))
        weights = (weights / weights.sum()).to(image).expand(image.shape[-1], 1, 1, -1)
        planes = functional.pad(image.movedim(-1, 1), (blur_radius,) * 4, mode="reflect")
        across = functional.conv2d(planes, weights, groups=image.shape[-1])
        return (functional.conv2d(across, weights.mT, groups=image.shape[-1]).movedim(1, -1),)


class ImagePadKJ:
    """Adds borders of one color, or of the picture's own edge."""

    FUNCTION = "pad"
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        border = ("INT", {"default": 0, "min": 0, "max": LARGEST, "step": 1})
        target = ("INT", {"default": 512, "min": 0, "max": LARGEST, "step": 1, "forceInput": True})
        return {
            "required": {
                "image": ("IMAGE",),
                **dict.fromkeys(("left", "right", "top", "bottom", "extra_padding"), border),
                "pad_mode": (["edge", "edge_pixel", "color", "pillarbox_blur"], {"default": "color"}),
                "color": ("STRING", {"default": "0, 0, 0"}),
            },
            "optional": {"mask": ("MASK",), "target_width": target, "target_height": target},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, pad_mode: str, color: str) -> bool | str:
        """Modes that are built, and a color."""
        if pad_mode == "pillarbox_blur":
            return f"pad_mode '{pad_mode}' runs in ComfyUI only: choose color, edge or edge_pixel."
        if len(to_color(color)) not in (1, 3, 4):
            return f"'{color}' is no color; write three numbers from 0 to 255, such as '0, 0, 0'."
        return True

    def pad(
        self,
        image: Tensor,
        left: int,
        right: int,
        top: int,
        bottom: int,
        extra_padding: int,
        pad_mode: str,
        color: str,
        mask: Tensor | None = None,
        target_width: int | None = None,
        target_height: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pictures, and masks that are 1 in the borders. With target sizes the picture lies in the middle."""
        height, width = image.shape[1:3]
        borders = [side + extra_padding for side in (left, right, top, bottom)]
        if target_width and target_height:
            if target_width < width or target_height < height:
                raise ValueError(
                    f"The target {target_width}x{target_height} is smaller than the picture, {width}x{height}; "
                    "resize it first."
                )
            spare = (target_width - width, target_height - height)
            borders = [spare[0] // 2, spare[0] - spare[0] // 2, spare[1] // 2, spare[1] - spare[1] // 2]
        inner = torch.zeros(image.shape[:3]) if mask is None else _masks(mask, height, width)[..., 0]
        masks = functional.pad(_cycled(inner, len(image)), borders, value=1.0)
        return with_borders(image, borders, pad_mode, color), masks


NODE_CLASS_MAPPINGS = {
    "ImageToMask": ImageToMask,
    "MaskToImage": MaskToImage,
    "InvertMask": InvertMask,
    "GrowMask": GrowMask,
    "GetMaskSizeAndCount": GetMaskSizeAndCount,
    "ImageCompositeMasked": ImageCompositeMasked,
    "ImageBlur": ImageBlur,
    "ImagePadKJ": ImagePadKJ,
}
