"""The bench's results as JSON, a Markdown table and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .bench import Clip, Row

FIGURES = ("lip_sync", "psnr", "ssim", "vae_psnr", "first_frame_psnr", "seconds")
SHEET_CLIPS, SHEET_FRAMES = 8, 10
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 900, 90, 16
VOICE, MOUTH, INK, PAPER = (150, 170, 200), (200, 60, 50), (40, 40, 40), (255, 255, 255)


def as_json(rows: Sequence[Row], more: Mapping[str, float]) -> dict[str, object]:
    """Everything but the videos; the first row is the default setting."""
    names = [f.name for f in fields(Row) if f.name != "clips"]
    return {"rows": [{name: getattr(row, name) for name in names} for row in rows], **more}


def as_markdown(rows: Sequence[Row], more: Mapping[str, float]) -> str:
    """A table, then the numbers that only the default setting has."""
    lines = [
        "| quantization / attention / precision / step cache | " + " | ".join(FIGURES) + " |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for row in rows:
        values = [getattr(row, name) for name in FIGURES]
        cells = [row.reason] if row.reason else [f"{value:.3f}" for value in values]
        lines.append(f"| {row.setting} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{name}: {value:.3f}" for name, value in more.items())])


def save_pictures(row: Row, folder: Path, number: int) -> None:
    """sheet_N.png: a line of frames a clip, the portrait first. mouths_N.png: mouth against voice."""
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(row.clips[:SHEET_CLIPS]).save(folder / f"sheet_{number}.png", optimize=True)
    mouth_plot(row.clips[:SHEET_CLIPS]).save(folder / f"mouths_{number}.png", optimize=True)


def contact_sheet(clips: Sequence[Clip]) -> Image.Image:
    """Portrait and evenly spread frames of every clip."""
    lines = []
    for clip in clips:
        index = np.linspace(0, len(clip.video) - 1, SHEET_FRAMES).round().astype(int)
        lines.append(np.concatenate([clip.case.portrait.numpy(), *clip.video[index]], axis=1))
    return Image.fromarray((np.concatenate(lines).clip(0, 1) * 255).round().astype(np.uint8))


def mouth_plot(clips: Sequence[Clip]) -> Image.Image:
    """The mouth's opening over the voice's loudness, each scaled to its largest value."""
    picture = Image.new("RGB", (PLOT_WIDTH, len(clips) * PLOT_HEIGHT + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, clip in enumerate(clips):
        base = (number + 1) * PLOT_HEIGHT
        level = clip.case.levels[0]
        for values, color, width in ((level, VOICE, 3), (clip.mouth, MOUTH, 1)):
            x = np.linspace(MARGIN, PLOT_WIDTH - MARGIN, len(values))
            y = base - values / max(values.max(), 1e-9) * (PLOT_HEIGHT - 2 * MARGIN)
            pen.line([*zip(x.tolist(), y.tolist(), strict=True)], fill=color, width=width)
        pen.text((MARGIN, base - PLOT_HEIGHT + 2), f"{clip.case.name}: voice blue, mouth red", fill=INK)
    return picture
