"""The command `wanvideo bench KIND`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ..attention import ATTENTION_MODES
from ..host import StandaloneHost, set_host
from ..wanvideo.quantization import QUANTIZATIONS
from .random_model import MODELS, Case
from .report import as_json, check_plot, plot, table


class Kind(NamedTuple):
    """What is measured, and the options that it reads besides model, size and where results go."""

    what: str
    reads: tuple[str, ...] = ()


# The module of a kind is imported when it is asked for: some import what others do not need.
KINDS = {
    "step": Kind("a forward of the transformer", ("speakers", "quantization", "attention", "compile")),
    "linear": Kind("its linear layers, by quantization"),
    "attention": Kind("its self-attention, by option"),
    "vae": Kind("decoding and encoding with the VAE"),
    "load": Kind("loading a file", ("speakers", "quantization")),
    "swap": Kind("forwards with blocks in main memory", ("speakers", "quantization", "attention", "swap")),
    "run": Kind("a whole video", ("speakers", "quantization", "attention", "swap", "steps", "limit", "encoders")),
}
DEFAULTS = {
    "speakers": 0, "quantization": "disabled", "attention": "sdpa", "compile": False, "swap": None, "steps": 6,
    "limit": None, "encoders": False,
}  # fmt: skip
MOST_SPEAKERS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("kind", choices=KINDS, help="; ".join(f"{name}: {kind.what}" for name, kind in KINDS.items()))
    parser.add_argument("--model", choices=MODELS, default="14B", help="default: 14B")
    parser.add_argument("--size", type=_size, default=(832, 480, 81), metavar="WxHxF", help="default: 832x480x81")
    parser.add_argument("--speakers", type=int, metavar="N", help="of a talking video; 0: text to video")
    parser.add_argument("--quantization", choices=QUANTIZATIONS)
    parser.add_argument("--attention", choices=ATTENTION_MODES)
    parser.add_argument("--swap", type=int, metavar="N", help="blocks in main memory; for swap and run")
    parser.add_argument("--steps", type=int, metavar="N", help="of run (default: 6)")
    parser.add_argument("--limit", type=float, metavar="GIB", help="GPU memory that run may take (default: all)")
    parser.add_argument("--encoders", action="store_true", help="run encodes prompt and picture first")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of all that step compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, versions and command here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a bar chart (PNG; needs matplotlib)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.set_defaults(**DEFAULTS)


def _size(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: give width, height and frames as 832x480x81")
    width, height, frames = map(int, found.groups())
    return width, height, frames


def run(options: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError for a case that cannot run here, before anything is measured."""
    _check(options)
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
    sys.stdout.write(table(rows) + "\n")
    if options.json is not None:
        options.json.write_text(as_json(rows, ["wanvideo", *sys.argv[1:]], host.device()) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(rows, f"wanvideo bench {options.kind}, {case.model}", options.plot)


def _check(options: argparse.Namespace) -> None:
    unread = [name for name, usual in DEFAULTS.items() if getattr(options, name) != usual]
    unread = [name for name in unread if name not in KINDS[options.kind].reads]
    if unread:
        names = ", ".join(f"--{name}" for name in unread)
        raise ValueError(f"'wanvideo bench {options.kind}' does not read {names}: leave it out.")
    if not 0 <= options.speakers <= MOST_SPEAKERS:
        raise ValueError(f"--speakers must be between 0 and {MOST_SPEAKERS}, not {options.speakers}.")
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {path.absolute().parent}: make it, or write the file elsewhere.")
    if options.plot is not None:
        check_plot()
