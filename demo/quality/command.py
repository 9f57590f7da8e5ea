"""`wanvideo quality`: which settings run, and where the results go."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from ...attention import ATTENTION_MODES
from ...host import StandaloneHost, set_host
from ...wanvideo.quantization import QUANTIZATIONS
from .. import MODELS
from . import heldout
from .bench import extras, measure
from .report import as_json, as_markdown, save_pictures
from .talker import CACHES, Setting, Talker

FULL_SET = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--clips", type=int, default=FULL_SET, help=f"clips of 5 s a setting (default: {FULL_SET})")
    parser.add_argument(
        "--settings", choices=("default", "all"), default="all", help="the default setting alone, or all"
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the demo's models")


def run(options: argparse.Namespace) -> None:
    """Measure, write results below --out, print them."""
    if options.clips < 1:
        raise ValueError(f"--clips must be at least 1, not {options.clips}.")
    host = StandaloneHost(models=options.models, outputs=options.out, device=options.device)
    set_host(host)
    cases = [heldout.single(number) for number in range(options.clips)]
    rows = [measure(Setting(), cases, None)]
    if rows[0].reason:
        raise RuntimeError(f"The default setting cannot run: {rows[0].reason}")
    more = extras(rows[0], Talker(Setting()))
    folder = host.output_dir() / "quality"
    save_pictures(rows[0], folder, 0)
    for number, setting in enumerate(settings() if options.settings == "all" else (), start=1):
        row = measure(setting, cases, rows[0])
        if not row.reason:
            save_pictures(row, folder, number)
        # Videos of all settings together would take gigabytes.
        rows.append(replace(row, clips=()))
    found, table = as_json(rows, more), as_markdown(rows, more)
    (folder / "quality.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / "quality.md").write_text(table + "\n", encoding="utf-8")
    sys.stdout.write((json.dumps(found) if options.json else table) + "\n")


def settings() -> list[Setting]:
    """Every other quantization, attention and step cache, each alone, and full precision."""
    return [
        Setting(precision="fp32"),
        *(Setting(quantization=name) for name in QUANTIZATIONS if name != Setting.quantization),
        *(Setting(attention=name) for name in ATTENTION_MODES if name != Setting.attention),
        *(Setting(cache=name) for name in CACHES),
    ]
