"""The command: `python -m wanvideo_wrapper.demo.train --out DIR`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from .stages import Plan, prepare_device, see_and_hear, talk_stage

STAGES = {"see": (see_and_hear,), "talk": (talk_stage,), "all": (see_and_hear, talk_stage)}


def main() -> None:
    """Train one stage or all."""
    parser = argparse.ArgumentParser(description="Trains the demo's models: about 13 minutes on an H100.")
    parser.add_argument("--out", type=Path, required=True, help="folder for models/ and the files to go on from")
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--see-seconds", type=float, default=Plan.see_seconds, help="VAE")
    parser.add_argument("--hear-seconds", type=float, default=Plan.hear_seconds, help="audio encoder")
    parser.add_argument("--talk-seconds", type=float, default=Plan.talk_seconds, help="transformer")
    parser.add_argument("--takes", type=int, default=Plan.takes, help="stretches of speech")
    parser.add_argument("--share", type=float, default=Plan.share, help="share of the usual number of clips")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stage = options.pop("stage")
    prepare_device()
    for run in STAGES[stage]:
        run(Plan(**options))


if __name__ == "__main__":
    main()
