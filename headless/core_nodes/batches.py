"""Batches of pictures: making, joining, choosing, padding, labels (ComfyUI and KJNodes)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...node_tools import Inputs
from ...wanvideo.images import resize_images
from .pictures import LARGEST, ImageConcatMulti, fit

MANY = 4096
FOREVER = 2**53 - 1
BLENDS = {"cut": None, "linear_blend": lambda a: a, "ease_in_out": lambda a: a * a * (3 - 2 * a)}


class EmptyImage:
    """Pictures of one color, 0xRRGGBB."""

    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 1, "max": LARGEST, "step": 1}
        return {
            "required": {
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": MANY}),
                "color": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1}),
            }
        }

    def generate(self, width: int, height: int, batch_size: int = 1, color: int = 0) -> tuple[Tensor]:
        """IMAGE [batch_size, height, width, 3]; the pictures share their memory."""
        channels = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]) / 255
        return (channels.expand(batch_size, height, width, 3),)


class RepeatImageBatch:
    """The whole batch, several times."""

    FUNCTION = "repeat"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("IMAGE",), "amount": ("INT", {"default": 1, "min": 1, "max": MANY})}}

    def repeat(self, image: Tensor, amount: int) -> tuple[Tensor]:
        """[n * amount, H, W, C]."""
        return (image.repeat(amount, 1, 1, 1),)


class ImageBatch:
    """Two batches one after the other; the second is cut and scaled to the size of the first."""

    FUNCTION = "batch"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image1": ("IMAGE",), "image2": ("IMAGE",)}}

    def batch(self, image1: Tensor, image2: Tensor) -> tuple[Tensor]:
        """[n1 + n2, H1, W1, C]."""
        channels = min(image1.shape[-1], image2.shape[-1])
        fitted = _centered(image2, image1.shape[2], image1.shape[1], "bilinear")
        return (torch.cat((image1[..., :channels], fitted[..., :channels])),)


class ImageBatchMulti:
    """Any number of batches one after the other, at the size of the first."""

    FUNCTION = "combine"
    RETURN_TYPES = ("IMAGE",)
    ACCEPTS_ALL = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "inputcount": ("INT", {"default": 2, "min": 2, "max": 1000, "step": 1}),
                "image_1": ("IMAGE",),
            },
            "optional": {"image_2": ("IMAGE",)},
        }

    @classmethod
    def EXTRA_INPUTS(cls, values: dict[str, object]) -> dict[str, tuple[object, ...]]:
        """image_3, image_4, ..."""
        return ImageConcatMulti.EXTRA_INPUTS(values)

    def combine(self, inputcount: int, image_1: Tensor, **images: Tensor) -> tuple[Tensor]:
        """Inputs that are not connected are left out."""
        result = image_1
        for number in range(2, inputcount + 1):
            part = images.get(f"image_{number}")
            if part is not None:
                (result,) = ImageBatch().batch(result, part)
        return (result,)


class GetImagesFromBatchIndexed:
    """Pictures of a batch by their numbers."""

    FUNCTION = "indexedimagesfrombatch"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"images": ("IMAGE",), "indexes": ("STRING", {"default": "0, 1, 2", "multiline": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, indexes: str) -> bool:
        """Whole numbers between commas."""
        _numbers(indexes)
        return True

    def indexedimagesfrombatch(self, images: Tensor, indexes: str) -> tuple[Tensor]:
        """One picture a number, in their order; negative ones count from the end."""
        numbers = _numbers(indexes)
        wrong = [number for number in numbers if not -len(images) <= number < len(images)]
        if wrong:
            raise ValueError(f"There is no picture {wrong[0]} among {len(images)}; correct 'indexes'.")
        return (images[numbers],)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"'{text:.80}' are no indexes; write whole numbers between commas, such as '0, 1, 2'.")
    return numbers


class ImageBatchRepeatInterleaving:
    """Each picture several times in a row, and masks that are 1 for the first of each."""

    FUNCTION = "repeat"
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        repeats = {"default": 1, "min": 1, "max": MANY}
        return {"required": {"images": ("IMAGE",), "repeats": ("INT", repeats)}, "optional": {"mask": ("MASK",)}}

    def repeat(self, images: Tensor, repeats: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[n * repeats, H, W, C]; given masks are repeated like pictures."""
        repeated = images.repeat_interleave(repeats, dim=0)
        if mask is not None:
            return repeated, mask.repeat_interleave(repeats, dim=0)
        masks = torch.zeros(repeated.shape[:3])
        masks[::repeats] = 1
        return repeated, masks


class SplitImages:
    """A batch in two; a negative index counts from the end (VHS_SplitImages)."""

    FUNCTION = "split_images"
    RETURN_TYPES = ("IMAGE", "INT", "IMAGE", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        index = {"default": 0, "step": 1, "min": -FOREVER, "max": FOREVER}
        return {"required": {"images": ("IMAGE",), "split_index": ("INT", index)}}

    def split_images(self, images: Tensor, split_index: int) -> tuple[Tensor, int, Tensor, int]:
        """Both parts with their numbers; one of them may be empty."""
        first, second = images[:split_index], images[split_index:]
        return first, len(first), second, len(second)


class SelectEveryNthImage:
    """Every nth picture (VHS_SelectEveryNthImage)."""

    FUNCTION = "select_images"
    RETURN_TYPES = ("IMAGE", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "images": ("IMAGE",),
                "select_every_nth": ("INT", {"default": 1, "min": 1, "max": FOREVER, "step": 1}),
                "skip_first_images": ("INT", {"default": 0, "min": 0, "max": FOREVER, "step": 1}),
            }
        }

    def select_images(self, images: Tensor, select_every_nth: int, skip_first_images: int) -> tuple[Tensor, int]:
        """The pictures and their number."""
        chosen = images[skip_first_images::select_every_nth]
        if not len(chosen):
            raise ValueError(f"skip_first_images {skip_first_images} leaves none of {len(images)} pictures.")
        return chosen, len(chosen)


class ImageConcanate:
    """Two pictures side by side."""

    FUNCTION = "concatenate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image1": ("IMAGE",),
                "image2": ("IMAGE",),
                "direction": (["right", "down", "left", "up"], {"default": "right"}),
                "match_image_size": ("BOOLEAN", {"default": True}),
            }
        }

    def concatenate(
        self, image1: Tensor, image2: Tensor, direction: str, match_image_size: bool
    ) -> tuple[Tensor]:
        """With match_image_size the second takes the side of the first at which they meet, in proportion."""
        sides = (image1.shape[2], image1.shape[1])
        if match_image_size:
            goal = (0, sides[1]) if direction in ("right", "left") else (sides[0], 0)
            size = fit((image2.shape[2], image2.shape[1]), goal, "resize", "center").size
            image2 = resize_images(image2, *size)
        axis = 2 if direction in ("right", "left") else 1
        count = max(len(image1), len(image2))
        pair = [_lengthened(image[..., : min(image1.shape[-1], image2.shape[-1])], count) for image in (image1, image2)]
        if pair[0].shape[3 - axis] != pair[1].shape[3 - axis]:
            raise ValueError("ImageConcanate: the pictures differ in the side where they meet: set match_image_size.")
        return (torch.cat(pair if direction in ("right", "down") else pair[::-1], dim=axis),)


def _lengthened(images: Tensor, count: int) -> Tensor:
    return images[torch.arange(count).clamp(max=len(images) - 1)]


class ImageResizeKJ:
    """Resizes pictures: stretched, in proportion, or with their middle cut out."""

    FUNCTION = "resize"
    RETURN_TYPES = ("IMAGE", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 0, "max": LARGEST, "step": 8}
        return {
            "required": {
                "image": ("IMAGE",),
                "width": ("INT", side),
                "height": ("INT", side),
                "upscale_method": (["nearest-exact", "bilinear", "area", "bicubic", "lanczos"],),
                "keep_proportion": ("BOOLEAN", {"default": False}),
                "divisible_by": ("INT", {"default": 2, "min": 0, "max": 512, "step": 1}),
            },
            "optional": {
                "width_input": ("INT", {"forceInput": True}),
                "height_input": ("INT", {"forceInput": True}),
                "get_image_size": ("IMAGE",),
                # The number is what some editors saved in place of width_input.
                "crop": (["disabled", "center", 0], {"default": "disabled"}),
            },
        }

    def resize(
        self,
        image: Tensor,
        width: int,
        height: int,
        upscale_method: str,
        keep_proportion: bool,
        divisible_by: int,
        width_input: int | None = None,
        height_input: int | None = None,
        get_image_size: Tensor | None = None,
        crop: str = "disabled",
    ) -> tuple[Tensor, int, int]:
        """The pictures and their size; a side of 0 keeps that side, or the proportions."""
        source = (image.shape[2], image.shape[1])
        goal = (width_input or width, height_input or height)
        if get_image_size is not None:
            goal = (get_image_size.shape[2], get_image_size.shape[1])
        elif keep_proportion:
            goal = fit(source, goal, "resize", "center").size
        step = max(divisible_by, 1)
        size = tuple(max((side or own) // step, 1) * step for side, own in zip(goal, source, strict=True))
        scaled = _centered if crop == "center" else resize_images
        return scaled(image, *size, upscale_method), *size


def _centered(images: Tensor, width: int, height: int, method: str) -> Tensor:
    """The largest part in the middle that has the proportions, at the size."""
    left, top, wide, high = fit((images.shape[2], images.shape[1]), (width, height), "crop", "center").crop
    return resize_images(images[:, top : top + high, left : left + wide], width, height, method)


class ImageBatchExtendWithOverlap:
    """Goes on from the last pictures of a batch: hands them out, and joins what was made of them."""

    FUNCTION = "imagesfrombatch"
    RETURN_TYPES = ("IMAGE", "IMAGE", "IMAGE")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        modes = [*BLENDS, "filmic_crossfade", "perceptual_crossfade"]
        return {
            "required": {
                "source_images": ("IMAGE",),
                "overlap": ("INT", {"default": 13, "min": 1, "max": MANY, "step": 1}),
                "overlap_side": (["source", "new_images"], {"default": "source"}),
                "overlap_mode": (modes, {"default": "linear_blend"}),
            },
            "optional": {"new_images": ("IMAGE",)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, overlap_mode: str) -> bool | str:
        """Modes that are built."""
        known = ", ".join(BLENDS)
        return overlap_mode in BLENDS or f"overlap_mode '{overlap_mode}' runs in ComfyUI only: use one of {known}."

    def imagesfrombatch(
        self,
        source_images: Tensor,
        overlap: int,
        overlap_side: str,
        overlap_mode: str,
        new_images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The source, its last `overlap` pictures, and source and new pictures joined (black without new ones)."""
        if overlap > len(source_images):
            raise ValueError(f"overlap {overlap} is more than the {len(source_images)} source_images; choose less.")
        start = source_images[-overlap:]
        if new_images is None:
            return source_images, start, torch.zeros(1, 64, 64, 3)
        if new_images.shape[1:] != source_images.shape[1:] or len(new_images) < overlap:
            raise ValueError(
                f"new_images {tuple(new_images.shape)} must have the size of source_images "
                f"{tuple(source_images.shape)} and at least {overlap} pictures."
            )
        before, after = source_images[:-overlap], new_images[overlap:]
        curve = BLENDS[overlap_mode]
        if curve is None:
            shared = start if overlap_side == "new_images" else new_images[:overlap]
        else:
            # Neither end is 0 or 1: those pictures lie beside the overlap already.
            weight = curve(torch.linspace(0, 1, overlap + 2)[1:-1])[:, None, None, None]
            shared = start * (1 - weight) + new_images[:overlap] * weight
        return source_images, start, torch.cat((before, shared, after))


NODE_CLASS_MAPPINGS = {
    "EmptyImage": EmptyImage,
    "RepeatImageBatch": RepeatImageBatch,
    "ImageBatch": ImageBatch,
    "ImageBatchMulti": ImageBatchMulti,
    "GetImagesFromBatchIndexed": GetImagesFromBatchIndexed,
    "ImageBatchRepeatInterleaving": ImageBatchRepeatInterleaving,
    "VHS_SplitImages": SplitImages,
    "VHS_SelectEveryNthImage": SelectEveryNthImage,
    "ImageConcanate": ImageConcanate,
    "ImageResizeKJ": ImageResizeKJ,
    "ImageBatchExtendWithOverlap": ImageBatchExtendWithOverlap,
}
