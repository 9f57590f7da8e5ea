"""Where a subject is: masks grown, made blocky, drawn and shown, and pictures cut around them (ComfyUI, KJNodes)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFilter
from torch import Tensor
from torch.nn import functional

from ...node_tools import Inputs
from ...wanvideo.images import resize_images
from .masks import GrowMask
from .pictures import LARGEST, PreviewImage

Box = tuple[int, int, int, int]

DEVICES = (["cpu", "gpu"], {"default": "cpu"})
TOKEN = 16


class GrowMaskWithBlur:
    """Grows masks by pixels, from mask to mask by more, and blurs them."""

    FUNCTION = "expand_mask"
    RETURN_TYPES = ("MASK", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        share = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "mask": ("MASK",),
                "expand": ("INT", {"default": 0, "min": -LARGEST, "max": LARGEST, "step": 1}),
                "incremental_expandrate": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "tapered_corners": ("BOOLEAN", {"default": True}),
                "flip_input": ("BOOLEAN", {"default": False}),
                "blur_radius": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100, "step": 0.1}),
                "lerp_alpha": ("FLOAT", share),
                "decay_factor": ("FLOAT", share),
            },
            "optional": {"fill_holes": ("BOOLEAN", {"default": False})},
        }

    def expand_mask(
        self,
        mask: Tensor,
        expand: int,
        incremental_expandrate: float,
        tapered_corners: bool,
        flip_input: bool,
        blur_radius: float,
        lerp_alpha: float,
        decay_factor: float,
        fill_holes: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The masks and what is left of 1. lerp_alpha and decay_factor below 1 mix each with the one before."""
        masks = mask.reshape(-1, *mask.shape[-2:])
        grown: list[Tensor] = []
        pixels, step = float(expand), -incremental_expandrate if expand < 0 else incremental_expandrate
        for part in 1 - masks if flip_input else masks:
            (one,) = GrowMask().expand_mask(part[None], round(pixels), tapered_corners)
            one, pixels = _filled(one[0]) if fill_holes else one[0], pixels + step
            if grown and lerp_alpha < 1:
                one = torch.lerp(grown[-1], one, lerp_alpha)
            if grown and decay_factor < 1:
                one = one + decay_factor * grown[-1]
                one = one / one.max() if one.max() > 0 else one
            grown.append(one)
        result = torch.stack([_blurred(one, blur_radius) for one in grown] if blur_radius else grown)
        return result, 1 - result


def _filled(mask: Tensor) -> Tensor:
    from scipy import ndimage

    return torch.from_numpy(ndimage.binary_fill_holes((mask > 0).cpu().numpy())).float()


def _blurred(mask: Tensor, radius: float) -> Tensor:
    """Pillow's Gaussian blur, at 8 bits."""
    picture = Image.fromarray((mask.clamp(0, 1) * 255).byte().cpu().numpy())
    return torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(radius)))).float() / 255


class BlockifyMask:
    """Divides the frame around each mask into blocks and fills those that the mask touches."""

    FUNCTION = "process"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"default": 32, "min": 8, "max": 512, "step": 1}
        return {"required": {"masks": ("MASK",), "block_size": ("INT", size)}, "optional": {"device": DEVICES}}

    def process(self, masks: Tensor, block_size: int, device: str = "cpu") -> tuple[Tensor]:
        """MASK of 0 and 1; blocks at the right and lower border take what does not divide."""
        return (torch.stack([_blocks(mask, block_size) for mask in masks]),)


def _blocks(mask: Tensor, size: int) -> Tensor:
    result = torch.zeros_like(mask)
    touched = mask > 0
    if not touched.any():
        return result
    box = []
    for axis in (1, 0):
        places = touched.any(dim=axis).nonzero().flatten()
        first, length = int(places[0]), int(places[-1] - places[0]) + 1
        count = max(length // size, 1)
        edges = [first + length // count * i for i in range(count)]
        box.append([slice(*pair) for pair in zip(edges, (*edges[1:], first + length), strict=True)])
    for rows in box[0]:
        for columns in box[1]:
            result[rows, columns] = float(touched[rows, columns].any())
    return result


class DrawMaskOnImage:
    """Paints masks upon pictures in one color, which may be partly transparent."""

    FUNCTION = "apply"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"image": ("IMAGE",), "mask": ("MASK",), "color": ("STRING", {"default": "0, 0, 0"})},
            "optional": {"device": DEVICES},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, color: str) -> bool:
        """A color that can be read."""
        _color(color)
        return True

    def apply(self, image: Tensor, mask: Tensor, color: str, device: str = "cpu") -> tuple[Tensor]:
        """IMAGE. Masks start over where they are fewer than pictures; alpha of pictures grows with the paint's."""
        *rgb, alpha = _color(color)
        masks = mask
        if masks.shape[1:] != image.shape[1:3]:
            masks = functional.interpolate(masks[:, None], size=image.shape[1:3], mode="nearest-exact")[:, 0]
        share = masks[torch.arange(len(image)) % len(masks)][..., None] * alpha
        painted = image[..., :3] * (1 - share) + torch.tensor(rgb) * share
        return (torch.cat((painted, torch.maximum(image[..., 3:], share)), -1) if image.shape[-1] == 4 else painted,)


def _color(text: str) -> tuple[float, ...]:
    """Red, green, blue and alpha in 0..1 of #rrggbb, #rrggbbaa, or numbers (up to 1, or up to 255) between commas."""
    text = text.strip()
    try:
        if text.startswith("#"):
            numbers = [part / 255 for part in ImageColor.getrgb(text)]
        else:
            numbers = [number / 255 if (number := float(part)) > 1 else number for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"'{text:.40}' is no color; write three numbers from 0 to 255 between commas, or #rrggbb.")
    return (*numbers, 1.0) if len(numbers) == 3 else tuple(numbers)


class MaskPreview(PreviewImage):
    """Saves masks to the temporary folder."""

    FUNCTION = "show_masks"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"mask": ("MASK",)}}

    def show_masks(self, mask: Tensor) -> dict[str, dict[str, list[str]]]:
        """One numbered file a mask."""
        return self.save_images(mask.reshape(-1, *mask.shape[-2:])[..., None].expand(-1, -1, -1, 3))


class ImageCropByMaskAndResize:
    """Cuts pictures around their masks, all of them to one size."""

    FUNCTION = "crop"
    RETURN_TYPES = ("IMAGE", "MASK", "BBOX")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"min": 0, "max": LARGEST, "step": 8}
        return {
            "required": {
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "base_resolution": ("INT", {"default": 512, **side}),
                "padding": ("INT", {"default": 0, **side, "step": 1}),
                "min_crop_resolution": ("INT", {"default": 128, **side}),
                "max_crop_resolution": ("INT", {"default": 512, **side}),
            }
        }

    def crop(
        self,
        image: Tensor,
        mask: Tensor,
        base_resolution: int,
        padding: int,
        min_crop_resolution: int,
        max_crop_resolution: int,
    ) -> tuple[Tensor, Tensor, list[Box]]:
        """Pictures and masks whose longer side is base_resolution, and (left, top, right, bottom) of each cut."""
        if len(mask) < len(image):
            raise ValueError(f"There are {len(mask)} masks for {len(image)} pictures: give one for each.")
        limits = min_crop_resolution, max_crop_resolution
        rows, columns = image.shape[1:3]
        boxes = [_around(part.round() == 1, padding, limits) for part in mask[: len(image)]]
        wide, high = (-(-max(box[i] for box in boxes) // TOKEN) * TOKEN for i in (2, 3))
        aspect = max(width / height for _, _, width, height in boxes)
        size = (base_resolution, int(base_resolution / aspect)) if aspect > 1 else (
            int(base_resolution * aspect), base_resolution)  # fmt: skip
        width, height = (-(-side // TOKEN) * TOKEN for side in size)
        images, masks, cuts = [], [], []
        for picture, part, (x, y, w, h) in zip(image, mask, boxes, strict=False):
            left = max(0, min(int(x + w / 2 - wide / 2), columns - wide))
            top = max(0, min(int(y + h / 2 - high / 2), rows - high))
            cuts.append((left, top, left + wide, top + high))
            inside = (slice(top, top + high), slice(left, left + wide))
            images.append(resize_images(picture[inside][None], width, height))
            masks.append(functional.interpolate(part.round()[inside][None, None], (height, width), mode="bilinear")[0])
        return torch.cat(images), torch.cat(masks), cuts


def _around(subject: Tensor, padding: int, limits: tuple[int, int]) -> Box:
    """(left, top, width, height) around what is True, inside the picture; its middle where nothing is."""
    box = []
    for axis, length in ((0, subject.shape[1]), (1, subject.shape[0])):
        places = subject.any(dim=axis).nonzero().flatten()
        middle, size = (length / 2, 0)
        if len(places):
            first, last = int(places[0]), int(places[-1])
            middle, size = (first + last) / 2, last - first + 1
        least, most = limits
        size = max(size, least)
        size = min(size, most) if most else size
        size = min(size + 2 * min((length - size) // 2, padding), length)
        box.append((max(0, min(int(middle - size / 2), length - size)), size))
    (left, width), (top, height) = box
    return left, top, width, height


NODE_CLASS_MAPPINGS = {
    "GrowMaskWithBlur": GrowMaskWithBlur,
    "BlockifyMask": BlockifyMask,
    "DrawMaskOnImage": DrawMaskOnImage,
    "MaskPreview": MaskPreview,
    "ImageCropByMaskAndResize": ImageCropByMaskAndResize,
}
