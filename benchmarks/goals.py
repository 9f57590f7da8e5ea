"""Several benches one after the other on one GPU, each in a process of its own, within a given time; one table of all.

    python benchmarks/goals.py speed --out DIR [--seconds 540] [--only BENCH ...]
    python benchmarks/goals.py memory --out DIR [--seconds 540]

The most wanted figures come first. What would not fit into the time that is left is named and not begun; what fails is
named with its last line, and the rest goes on. DIR gets a JSON file of each bench, their output in log.txt, and the
table in table.md. Durations are estimates for an H200.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
COMMAND = (sys.executable, "-c", "import sys; from wanvideo_wrapper.headless.cli import main; sys.exit(main())")
BEST = ("--quantization", "fp8_e4m3fn_fast", "--attention", "auto_fp8")
BEST_16_BIT = ("--attention", "flash_attn_3")
LARGE, TALK = ("--size", "1280x720x81"), ("--size", "768x768x81")
SMALL_CARD = ("--steps", "3", "--swap", "40", "--limit", "8", "--encoders")
TALKING = (*TALK, "--speakers", "1")


class Job(NamedTuple):
    """A bench: its name, how long it takes in seconds, and its arguments. script: of this folder, in its place."""

    name: str
    lasts: int
    arguments: tuple[str, ...]
    script: str = ""


JOBS = {
    "speed": (
        Job("kernels", 25, ("--only", "gated_residual", "rms_norm", "rope_heads"), "kernel_forms.py"),
        Job("kernels_768", 20, ("--only", "rope_heads", "--tokens", "48384"), "kernel_forms.py"),
        Job("14B_480p_fp8", 40, ("step", *BEST)),
        Job("talk_1", 35, ("step", *TALKING, *BEST)),
        Job("talk_2", 35, ("step", *TALK, "--speakers", "2", *BEST)),
        Job("14B_480p_bf16", 45, ("step", *BEST_16_BIT)),
        Job("vae", 50, ("vae",)),
        Job("14B_720p_fp8", 60, ("step", *LARGE, *BEST)),
        Job("1.3B_fp8", 25, ("step", "--model", "1.3B", *BEST)),
        Job("1.3B_bf16", 25, ("step", "--model", "1.3B", *BEST_16_BIT)),
        Job("talk_run", 130, ("run", *TALKING, *BEST)),
        Job("talk_run_again", 130, ("run", *TALKING, *BEST)),
        Job("14B_480p_compiled", 90, ("step", "--compile", *BEST)),
    ),
    "memory": (
        Job("14B_480p_swapped", 110, ("swap", *BEST)),
        Job("talk_swapped", 130, ("swap", *TALKING, *BEST)),
        Job("talk_480p_in_8_GiB", 170, ("run", "--speakers", "1", *SMALL_CARD, *BEST)),
        Job("14B_720p_swapped", 170, ("swap", *LARGE, *BEST)),
        Job("14B_480p_bf16_swapped", 130, ("swap",)),
    ),
}  # fmt: skip


def run(job: Job, folder: Path, log: Path) -> str:
    """Run it; why it gave nothing, or nothing."""
    started = time.monotonic()
    path = folder / f"{job.name}.json"
    if job.script:
        command = [sys.executable, str(HERE / job.script), *job.arguments]
    else:
        command = [*COMMAND, "bench", *job.arguments, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    taken = time.monotonic() - started
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {job.name} ({taken:.0f} s): {' '.join(job.arguments)}\n{done.stdout}{done.stderr[-4000:]}\n")
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    if job.script:
        found = [json.loads(line) for line in done.stdout.splitlines()]
        rows = [
            {"name": f"{one['kernel']}: {form}", **values} for one in found for form, values in one["forms"].items()
        ]
        path.write_text(json.dumps({"device": found[0]["device"], "rows": rows}, indent=1), encoding="utf-8")
    return ""


def lines(job: Job, path: Path) -> list[str]:
    """Rows of the table, a figure each."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"| {job.name} | {row['name']} | {unit} | {value if isinstance(value, str) else f'{value:.4g}'} |"
        for row in found["rows"]
        for unit, value in row.items()
        if unit != "name"
    ]


def all_of(jobs: Sequence[Job], folder: Path, limit: float) -> list[str]:
    """Run what fits into `limit` seconds; the table."""
    started = time.monotonic()
    table = ["| bench | row | unit | value |", "|---|---|---|---|"]
    for job in jobs:
        if time.monotonic() - started + job.lasts > limit:
            table.append(f"| {job.name} | not begun: {job.lasts} s would not fit | | |")
            continue
        why = run(job, folder, folder / "log.txt")
        table += [f"| {job.name} | failed: {why} | | |"] if why else lines(job, folder / f"{job.name}.json")
        # After each, so that a run that is cut off has shown the rest.
        (folder / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    return table


def main() -> None:
    """Run a list and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", choices=JOBS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="BENCH", help="these of the list (default: all)")
    parser.add_argument("--seconds", type=float, default=540, help="for all of them (default: 540)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS[options.list] if options.only is None or job.name in options.only]
    sys.stdout.write("\n".join(all_of(jobs, options.out, options.seconds)) + "\n")


if __name__ == "__main__":
    main()
