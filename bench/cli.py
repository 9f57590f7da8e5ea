"""The command `wanvideo bench KIND`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from ..attention import ATTENTION_MODES
from ..host import StandaloneHost, set_host
from ..wanvideo.quantization import QUANTIZATIONS
from .random_model import MODELS, Case
from .report import as_json, check_plot, plot, table

# Kind -> what it measures. Its module is imported when it is asked for: some import what others do not need.
KINDS = {
    "step": "a forward of the transformer",
    "linear": "its linear layers, by quantization",
    "attention": "its self-attention, by option",
    "vae": "decoding and encoding with the VAE",
    "load": "loading a file",
    "swap": "forwards with blocks in main memory",
    "run": "a whole video",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("kind", choices=KINDS, help="; ".join(f"{name}: {what}" for name, what in KINDS.items()))
    parser.add_argument("--model", choices=MODELS, default="14B", help="default: 14B")
    parser.add_argument("--size", type=_size, default=(832, 480, 81), metavar="WxHxF", help="default: 832x480x81")
    parser.add_argument("--speakers", type=int, default=0, metavar="N", help="of a talking video; 0: text to video")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="disabled")
    parser.add_argument("--attention", choices=ATTENTION_MODES, default="sdpa")
    parser.add_argument("--swap", type=int, metavar="N", help="blocks in main memory; for swap and run")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of run (default: 6)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of all that step compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, versions and command here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a bar chart (PNG; needs matplotlib)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _size(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: give width, height and frames as 832x480x81")
    width, height, frames = map(int, found.groups())
    return width, height, frames


def run(options: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError for a case that cannot run here."""
    if options.plot is not None:
        check_plot()
    host = StandaloneHost(device=options.device)
    set_host(host)
    case = Case(
        model=options.model,
        size=options.size,
        speakers=options.speakers,
        quantization=options.quantization,
        attention=options.attention,
    )
    rows = importlib.import_module(f".{options.kind}", __package__).measure(case, options, host)
    if options.json is not None:
        options.json.write_text(as_json(rows, ["wanvideo", *sys.argv[1:]], host.device()) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(rows, f"wanvideo bench {options.kind}, {case.model}", options.plot)
    sys.stdout.write(table(rows) + "\n")
