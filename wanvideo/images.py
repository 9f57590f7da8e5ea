"""Pictures between nodes (IMAGE, [frames, height, width, channels] in 0..1) and video ([3, F, H, W] in -1..1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .finite import check_finite

METHODS = ("lanczos", "bicubic", "bilinear", "nearest-exact", "area")


def resize_images(images: Tensor, width: int, height: int, method: str = "lanczos") -> Tensor:
    """Images [n, H, W, C] in 0..1 at another size, the aspect ratio not kept, by a method of ComfyUI's.

    Lanczos is Pillow's, at 8 bits. Nothing else smooths what it makes smaller; bicubic may leave 0..1.
    """
    if images.shape[1:3] == (height, width):
        return images
    if method == "lanczos":
        return _lanczos(images, width, height)
    moved = torch.nn.functional.interpolate(images.movedim(-1, 1), size=(height, width), mode=method)
    return moved.movedim(1, -1).contiguous()


def _lanczos(images: Tensor, width: int, height: int) -> Tensor:
    from PIL import Image

    frames = []
    for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy():
        # With an alpha channel Pillow weighs colors by it, so that what is transparent does not bleed into the rest.
        picture = Image.fromarray(image if image.shape[-1] > 1 else image[..., 0])
        frames.append(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1))
    return torch.from_numpy(np.stack(frames)).float().div(255).to(images.device)


def centered(images: Tensor, width: int, height: int) -> Tensor:
    """The largest part in the middle of images [n, H, W, C] that has the proportions of width x height."""
    rows, columns = images.shape[1:3]
    ratio, wanted = columns / rows, width / height
    # Sums in ComfyUI's order: half pixels fall to the side on which they fall there.
    left = round((columns - columns * (wanted / ratio)) / 2) if ratio > wanted else 0
    top = round((rows - rows * (ratio / wanted)) / 2) if ratio < wanted else 0
    return images[:, top : rows - top, left : columns - left]


def closest_size(aspect: float, area: int, step: int) -> tuple[int, int]:
    """Width and height of about `area` pixels at height / width = `aspect`, in multiples of `step`, rounded down.

    Source: Wan-Video/Wan2.1 (image2video).
    """
    sides = math.sqrt(area / aspect), math.sqrt(area * aspect)
    width, height = (max(int(side // step), 1) * step for side in sides)
    return width, height


def to_video(images: Tensor, width: int | None = None, height: int | None = None) -> Tensor:
    """IMAGE -> video [3, F, H, W] in -1..1, alpha dropped, resized where a size is given.

    Raises ValueError for pictures with NaN or infinity.
    """
    images = images[..., :3].float()
    check_finite("The pictures hold", images, unit="frame")
    if width is not None and height is not None:
        images = resize_images(images, width, height)
    return (images.movedim(-1, 0) * 2 - 1).contiguous()


def to_unit(video: Tensor) -> Tensor:
    """Frames in about -1..1 as IMAGE values in 0..1, through one copy: a long video is the largest thing in memory."""
    return torch.add(video, 1, out=torch.empty_like(video, dtype=torch.float32)).div_(2).clamp_(0, 1)


def to_images(video: Tensor) -> Tensor:
    """Video [3, F, H, W] in about -1..1 -> IMAGE in 0..1."""
    return video.float().clamp(-1, 1).add(1).div(2).movedim(0, -1).contiguous()
