"""Reading pictures: still-image formats by name, and no more pixels than a picture has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Of Pillow's other formats, some start programs (EPS), some read further files (FITS, MIC), and none is a photograph.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "TGA")
# A PNG of one color shrinks 8000 times: sizes are judged from the header, before pixels take memory.
LARGEST_PICTURE, LARGEST_ANIMATION = 2**26, 2**28
PLACEHOLDER_MASK = (64, 64)


def read_picture(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE [frames, H, W, 3] and MASK [frames, H, W], 1 where the picture is transparent.

    Raises ValueError for a file that is damaged, no picture, or larger than 67 million pixels.
    """
    from PIL import ImageSequence

    try:
        with open_picture(path) as picture:
            # The further pictures of an MPO are the same view again, from another angle or in another size.
            pages = [picture] if picture.format == "MPO" else ImageSequence.Iterator(picture)
            pictures = [_pixels(page) for page in _bounded(path, pages)]
    except Exception as error:
        raise _refusal(path, error) from error
    pictures = [pair for pair in pictures if pair[0].shape == pictures[0][0].shape]
    if len(pictures) == 1:
        return pictures[0][0][None], pictures[0][1][None]
    images, masks = (torch.stack(part) for part in zip(*pictures, strict=True))
    return images, masks


def check_picture(path: Path) -> None:
    """Raise ValueError unless the file's header is that of a picture that can be read; its pixels are not decoded."""
    try:
        open_picture(path).close()
    except Exception as error:
        raise _refusal(path, error) from error


class PictureError(ValueError):
    """A picture that is refused, in a sentence."""


def _refusal(path: Path, error: Exception) -> Exception:
    """Pillow's plugins raise whatever their parsers meet (SyntaxError, struct.error, IndexError, ...)."""
    if isinstance(error, PictureError):
        return error
    reason = type(error).__name__ if isinstance(error, MemoryError) else f"{error}"[:200]
    return PictureError(
        f"{path.name} is no picture that can be read ({reason}); choose a PNG, JPEG or WebP file."
    )


def open_picture(path: Path) -> Picture:
    """The picture, with its header read and its size checked."""
    from PIL import Image

    picture = Image.open(path, formats=[name for name in FORMATS if name in _known()])
    width, height = picture.size
    if width * height > LARGEST_PICTURE:
        picture.close()
        raise PictureError(
            f"{path.name} has {width}x{height} pixels, of which at most {LARGEST_PICTURE // 10**6} million can be "
            "taken; scale it down."
        )
    return picture


def _known() -> dict[str, object]:
    from PIL import Image

    Image.init()
    return Image.OPEN


def _bounded(path: Path, pages: object) -> object:
    total = 0
    for page in pages:
        total += page.size[0] * page.size[1]
        if total > LARGEST_ANIMATION:
            raise PictureError(f"{path.name} has too many frames for a picture; save it as a video.")
        yield page


def _pixels(picture: Picture) -> tuple[Tensor, Tensor]:
    """Colors [H, W, 3] and transparency [H, W]; ComfyUI's small empty mask where there is no transparency."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # Pillow cuts 16-bit gray off at 255 instead of scaling it.
        picture = Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return _floats(picture.convert("RGB")), torch.zeros(PLACEHOLDER_MASK)
    picture = picture.convert("RGBA")
    return _floats(picture.convert("RGB")), 1 - _floats(picture.getchannel("A"))


def _floats(picture: Picture) -> Tensor:
    return torch.from_numpy(np.array(picture)).float().div_(255)
