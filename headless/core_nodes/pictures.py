"""Pictures: loading, saving, resizing, joining (ComfyUI and KJNodes)."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...host import get_host
from ...node_tools import Inputs
from ...wanvideo.images import METHODS, resize_images
from ...wanvideo.whole_file import partial_file, publish
from ..picture_file import PLACEHOLDER_MASK, check_picture, read_picture
from ..video_file import to_pixels
from .borders import to_color, with_borders

Shown = dict[str, object]

LARGEST = 16384
# Bytes. Numbers and endings follow, and while a file is half written its host and process, too; 255 is the most.
LONGEST_STEM = 150
PROPORTIONS = ["stretch", "resize", "pad", "pad_edge", "pad_edge_pixel", "crop", "pillarbox_blur", "total_pixels"]
# By proportion, what borders are made of.
PADDINGS = {"pad": "color", "pad_edge": "edge", "pad_edge_pixel": "edge_pixel"}
# What file name prefixes may hold between percent signs, and strftime's names for the same.
DATE_PARTS = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "M": "%m", "dd": "%d", "d": "%d"}
TIME_PARTS = {"hh": "%H", "h": "%H", "mm": "%M", "m": "%M", "ss": "%S", "s": "%S"}
TIME_WORDS = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}


class LoadImage:
    """A picture from the input folder; its transparency is the mask."""

    FUNCTION = "load_image"
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("STRING", {"image_upload": True})}}

    def load_image(self, image: str) -> tuple[Tensor, Tensor]:
        """IMAGE [frames, H, W, 3] and MASK [frames, H, W], 1 where the picture is transparent."""
        return read_picture(get_host().readable_file(image))

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool:
        """The file is there, and its header is that of a picture."""
        check_picture(get_host().readable_file(image))
        return True


class SaveImage:
    """Saves pictures to the output folder as PNG."""

    FUNCTION = "save_images"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    WRITES = True
    KEEP = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        prefix = {"filename_prefix": ("STRING", {"default": "ComfyUI"})} if cls.KEEP else {}
        return {"required": {"images": ("IMAGE",), **prefix}}

    def save_images(self, images: Tensor, filename_prefix: str = "preview") -> Shown:
        """One numbered file a picture."""
        from PIL import Image

        host = get_host()
        base = host.output_dir() if self.KEEP else host.temp_dir()
        names = []
        for image in images:
            folder = next_file(base, filename_prefix, ".png").parent
            with partial_file(folder, "picture.png") as partial:
                Image.fromarray(to_pixels(image[..., :3])).save(partial, format="PNG")
                names.append(str(publish(partial, lambda: next_file(base, filename_prefix, ".png"))))
        return {"ui": {"images": names}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str = "preview") -> bool:
        """The prefix stays in the folder."""
        next_file(get_host().output_dir() if cls.KEEP else get_host().temp_dir(), filename_prefix, ".png")
        return True


class PreviewImage(SaveImage):
    """Saves pictures to the temporary folder."""

    KEEP = False


def next_file(base: Path, prefix: str, suffix: str) -> Path:
    """The next free numbered file base/prefix_00001suffix; %date:yyyy-MM-dd%, %year% and so on stand for the time.

    Raises ValueError if the prefix leaves the folder or names no file.
    """
    name = _dated(prefix).replace("\\", "/")
    if Path(name).name in ("", ".."):
        raise ValueError(f"The filename_prefix '{prefix}' names no file; write a name such as 'video'.")
    if len(name.rpartition("/")[2].encode("utf-8", "replace")) > LONGEST_STEM:
        raise ValueError(f"The filename_prefix '{prefix[:40]}...' is longer than {LONGEST_STEM} bytes: shorten it.")
    folder_and_stem = get_host().writable_folder(str(base.absolute() / name))
    folder, stem = folder_and_stem.parent, folder_and_stem.name
    numbered = re.compile(rf"{re.escape(stem)}_(\d+){re.escape(suffix)}")
    matches = [numbered.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())]
    number = 1 + max((int(match[1]) for match in matches if match), default=0)
    return folder / f"{stem}_{number:05d}{suffix}"


def _dated(prefix: str) -> str:
    parts = {**DATE_PARTS, **TIME_PARTS}
    for layout in re.findall(r"%date:(.*?)%", prefix):
        letters = re.sub("|".join(sorted(parts, key=len, reverse=True)), lambda part: parts[part[0]], layout)
        prefix = prefix.replace(f"%date:{layout}%", time.strftime(letters))
    for word, code in TIME_WORDS.items():
        prefix = prefix.replace(f"%{word}%", time.strftime(code))
    return prefix


class Fit(NamedTuple):
    """How a picture is brought to a size: cut this part out, scale it to this size, then pad these borders."""

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    pad: tuple[int, int, int, int]


def fit(source: tuple[int, int], target: tuple[int, int], mode: str, position: str) -> Fit:
    """source, target: (width, height), 0 in target keeps that side in proportion. crop: (left, top, width, height)."""
    (width, height), (goal_width, goal_height) = source, target
    whole, none = (0, 0, width, height), (0, 0, 0, 0)
    if mode == "total_pixels":
        area = goal_width * goal_height
        return Fit(whole, (int(math.sqrt(area * width / height)), int(math.sqrt(area * height / width))), none)
    if mode == "resize" or mode.startswith(("pad", "pillarbox")):
        ratios = [goal / side for goal, side in zip(target, source, strict=True) if goal]
        ratio = min(ratios, default=1.0)
        size = (round(width * ratio), round(height * ratio))
        if mode == "resize":
            return Fit(whole, size, none)
        spare = ((goal_width or size[0]) - size[0], (goal_height or size[1]) - size[1])
        left, top = (_share(extra, position, axis) for axis, extra in enumerate(spare))
        return Fit(whole, size, (left, spare[0] - left, top, spare[1] - top))
    goal = (goal_width or width, goal_height or height)
    if mode != "crop":
        return Fit(whole, goal, none)
    ratio = goal[0] / goal[1]
    part = (round(height * ratio), height) if width / height > ratio else (width, round(width / ratio))
    left, top = (_share(side - kept, position, a) for a, (side, kept) in enumerate(zip(source, part, strict=True)))
    return Fit((left, top, *part), goal, none)


def _share(extra: int, position: str, axis: int) -> int:
    """How much of the spare space comes first: horizontal axis 0, vertical axis 1."""
    first, last = (("left", "right"), ("top", "bottom"))[axis]
    return {first: 0, last: extra}.get(position, extra // 2)


class ImageResizeKJv2:
    """Resizes pictures: stretched, in proportion, cropped or padded."""

    FUNCTION = "resize"
    RETURN_TYPES = ("IMAGE", "INT", "INT", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 0, "max": LARGEST, "step": 1}
        methods = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos", "nvidia_rtx_vsr"]
        return {
            "required": {
                "image": ("IMAGE",),
                "width": ("INT", side),
                "height": ("INT", side),
                "upscale_method": (methods,),
                "keep_proportion": (PROPORTIONS, {"default": "stretch"}),
                "pad_color": ("STRING", {"default": "0, 0, 0"}),
                "crop_position": (["center", "top", "bottom", "left", "right"], {"default": "center"}),
                "divisible_by": ("INT", {"default": 2, "min": 0, "max": 512, "step": 1}),
            },
            "optional": {"mask": ("MASK",), "device": (["cpu", "gpu"],)},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, upscale_method: str = "lanczos", keep_proportion: str = "stretch", pad_color: str = "0"
    ) -> bool | str:
        """Modes that are built, and a color."""
        if upscale_method not in METHODS:
            return f"upscale_method '{upscale_method}' runs in ComfyUI only: choose lanczos."
        if keep_proportion == "pillarbox_blur":
            return f"keep_proportion '{keep_proportion}' runs in ComfyUI only: choose another, such as pad."
        if keep_proportion == "pad":
            to_color(pad_color)
        return True

    def resize(
        self,
        image: Tensor,
        width: int,
        height: int,
        upscale_method: str,
        keep_proportion: str,
        pad_color: str,
        crop_position: str,
        divisible_by: int,
        mask: Tensor | None = None,
        device: str = "cpu",
        unique_id: str | None = None,
    ) -> tuple[Tensor, int, int, Tensor]:
        """The pictures, their size, and the mask at that size."""
        refusal = self.VALIDATE_INPUTS(upscale_method, keep_proportion, pad_color)
        if refusal is not True:
            raise ValueError(refusal)
        source = (image.shape[2], image.shape[1])
        plan = fit(source, (width, height), keep_proportion, crop_position)
        step = max(divisible_by, 1)
        size = (max(plan.size[0] // step, 1) * step, max(plan.size[1] // step, 1) * step)
        pad = _filled_up(plan.pad, size, step)
        left, top, wide, high = plan.crop
        cut = image[:, top : top + high, left : left + wide]
        result = resize_images(cut, *size, upscale_method)
        if mask is None or (mask.shape[-2:] == PLACEHOLDER_MASK and source != PLACEHOLDER_MASK):
            masks = torch.zeros(result.shape[:3])
        else:
            whole = resize_images(mask[..., None], *source, "bilinear")
            masks = resize_images(whole[:, top : top + high, left : left + wide], *size, "bilinear")[..., 0]
        if any(pad):
            result, masks = with_borders(result, pad, PADDINGS[keep_proportion], pad_color), _padded_mask(masks, pad)
        return result, result.shape[2], result.shape[1], masks


def _filled_up(pad: tuple[int, int, int, int], size: tuple[int, int], step: int) -> tuple[int, int, int, int]:
    """The borders, with the right and the lower one grown until both sides divide by `step`."""
    if not any(pad):
        return pad
    left, right, top, bottom = pad
    return left, right + -(size[0] + left + right) % step, top, bottom + -(size[1] + top + bottom) % step


def _padded_mask(masks: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    """What was added is 1."""
    left, right, top, bottom = pad
    return torch.nn.functional.pad(masks, (left, right, top, bottom), value=1.0)


class GetImageSizeAndCount:
    """Width, height and number of pictures."""

    FUNCTION = "getsize"
    RETURN_TYPES = ("IMAGE", "INT", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("IMAGE",)}}

    def getsize(self, image: Tensor) -> tuple[Tensor, int, int, int]:
        """The pictures and their sizes."""
        return image, image.shape[2], image.shape[1], image.shape[0]


class GetImageRangeFromBatch:
    """Some of a batch's pictures or masks; start_index -1 takes the last ones."""

    FUNCTION = "imagesfrombatch"
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "start_index": ("INT", {"default": 0, "min": -1, "max": 4096, "step": 1}),
                "num_frames": ("INT", {"default": 1, "min": 1, "max": 4096, "step": 1}),
            },
            "optional": {"images": ("IMAGE",), "masks": ("MASK",)},
        }

    def imagesfrombatch(
        self, start_index: int, num_frames: int, images: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The range of both."""
        return _range(images, start_index, num_frames), _range(masks, start_index, num_frames)


def _range(batch: Tensor | None, start: int, count: int) -> Tensor | None:
    if batch is None:
        return None
    first = max(len(batch) - count, 0) if start == -1 else start
    if first >= len(batch):
        raise ValueError(f"start_index {start} is past the last of {len(batch)} pictures; choose a smaller one.")
    return batch[first : first + count]


class ImageConcatMulti:
    """Joins pictures side by side."""

    FUNCTION = "combine"
    RETURN_TYPES = ("IMAGE",)
    ACCEPTS_ALL = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "inputcount": ("INT", {"default": 2, "min": 2, "max": 1000, "step": 1}),
                "image_1": ("IMAGE",),
                "direction": (["right", "down", "left", "up"], {"default": "right"}),
                "match_image_size": ("BOOLEAN", {"default": False}),
            },
            "optional": {"image_2": ("IMAGE",)},
        }

    @classmethod
    def EXTRA_INPUTS(cls, values: dict[str, object]) -> dict[str, tuple[object, ...]]:
        """image_3, image_4, ..."""
        return {name: ("IMAGE",) for name in values if re.fullmatch(r"image_\d+", name) and name != "image_1"}

    def combine(
        self, inputcount: int, image_1: Tensor, direction: str, match_image_size: bool, **images: Tensor
    ) -> tuple[Tensor]:
        """All pictures in one; a batch that is shorter repeats its last picture."""
        result = image_1
        for number in range(2, inputcount + 1):
            part = images.get(f"image_{number}", torch.zeros_like(image_1))
            if match_image_size or part.shape[1:3] != image_1.shape[1:3]:
                part = resize_images(part, image_1.shape[2], image_1.shape[1])
            count = max(len(result), len(part))
            pair = [_repeated(result, count), _repeated(part[..., : image_1.shape[-1]], count)]
            axis = 2 if direction in ("right", "left") else 1
            result = torch.cat(pair if direction in ("right", "down") else pair[::-1], dim=axis)
        return (result,)


def _repeated(images: Tensor, count: int) -> Tensor:
    return images[torch.arange(count).clamp(max=len(images) - 1)]


NODE_CLASS_MAPPINGS = {
    "LoadImage": LoadImage,
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
    "ImageResizeKJv2": ImageResizeKJv2,
    "GetImageSizeAndCount": GetImageSizeAndCount,
    "GetImageRangeFromBatch": GetImageRangeFromBatch,
    "ImageConcatMulti": ImageConcatMulti,
}
