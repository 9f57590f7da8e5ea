"""The demo's portrait: a drawn face, front view."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
OVERSAMPLING = 4
SKIN, HAIR, WALL, SHIRT = (232, 190, 160), (74, 46, 30), (112, 150, 178), (178, 64, 58)
LIPS, WHITE, IRIS, BROW = (170, 80, 80), (250, 250, 248), (60, 92, 72), (60, 38, 26)


def draw() -> Image.Image:
    """A smiling head and shoulders in front of a plain wall, 256 x 256."""
    scale = SIZE * OVERSAMPLING / 256

    def box(*corners: float) -> list[float]:
        return [corner * scale for corner in corners]

    picture = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, WALL)
    pen = ImageDraw.Draw(picture)
    pen.ellipse(box(38, 204, 218, 330), fill=SHIRT)
    pen.rounded_rectangle(box(106, 170, 150, 226), radius=18 * scale, fill=tuple(c - 18 for c in SKIN))
    pen.ellipse(box(64, 34, 192, 176), fill=HAIR)
    pen.ellipse(box(74, 52, 182, 198), fill=SKIN)
    pen.pieslice(box(68, 36, 188, 140), 180, 360, fill=HAIR)
    for centre in (103, 153):
        pen.ellipse(box(centre - 13, 106, centre + 13, 126), fill=WHITE)
        pen.ellipse(box(centre - 6, 108, centre + 6, 124), fill=IRIS)
        pen.ellipse(box(centre - 3, 112, centre + 3, 120), fill=(20, 20, 20))
        pen.arc(box(centre - 16, 90, centre + 16, 112), 200, 340, fill=BROW, width=int(4 * scale))
    pen.polygon(box(128, 118, 120, 148, 136, 148), fill=tuple(c - 22 for c in SKIN))
    pen.ellipse(box(108, 160, 148, 176), fill=LIPS)
    pen.line(box(110, 168, 146, 168), fill=(110, 40, 44), width=int(2 * scale))
    return picture.filter(ImageFilter.GaussianBlur(OVERSAMPLING / 2)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def save(path: Path) -> None:
    """Write the portrait as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw().save(path, optimize=True)
