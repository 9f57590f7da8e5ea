"""What `wanvideo bench` shows: a table, a JSON file with everything needed to repeat it, a bar chart."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "diffusers", "comfy-kitchen", "sageattention", "flash-attn")


@dataclass(frozen=True)
class Row:
    """What was measured under this name, with the unit in the name of each value; or why it was not."""

    name: str
    values: Mapping[str, float]
    refused: str = ""


def table(rows: Sequence[Row]) -> str:
    """For the terminal, aligned."""
    columns = list(dict.fromkeys(unit for row in rows for unit in row.values))
    lines = [["", *columns], *([row.name, *(_cell(row, unit) for unit in columns)] for row in rows if row.values)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    return "\n".join([*shown, *(f"{row.name}: not run, {row.refused}" for row in rows if row.refused)])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]


def _cell(row: Row, unit: str) -> str:
    return f"{row.values[unit]:.4g}" if unit in row.values else ""


def as_json(rows: Sequence[Row], command: Sequence[str], device: torch.device) -> str:
    """Rows, and the machine, packages and command that gave them."""
    versions = {name: _version(name) for name in PACKAGES}
    found = {
        "command": " ".join(command),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "system": platform.platform(),
        "versions": {name: version for name, version in versions.items() if version},
        "rows": [{"name": row.name, **row.values, **({"refused": row.refused} if row.refused else {})} for row in rows],
    }
    return json.dumps(found, indent=1)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_plot() -> None:
    """Raises ImportError where no chart can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, which is missing here: pip install matplotlib, or leave it out.")


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the first value of every row, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.values]
    unit = next(iter(measured[0].values))
    figure = Figure(figsize=(8, 0.5 * len(measured) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row.name for row in measured], [row.values.get(unit, 0) for row in measured])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=unit, title=title)
    FigureCanvasAgg(figure).print_png(path)
