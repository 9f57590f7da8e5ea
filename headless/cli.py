"""The command `wanvideo`: run a workflow, run the demo, say what a file is."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench import cli as bench_command
from ..demo.quality import command as quality_command
from ..distributed.watch import on_stop
from ..host import CancelledError, StandaloneHost, set_host
from ..registry import SYSTEMS
from . import batch as batch_command
from .job import Edits, Folders, Job, lines, show

if TYPE_CHECKING:
    from .graph import Prompt

log = logging.getLogger("wanvideo")

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
FAILED, CANCELLED = 2, 130
MOST_FPS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 after an error, 130 when cancelled."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options.command(options)
    except (CancelledError, KeyboardInterrupt) as error:
        _say("Cancelled.", error)
        return CANCELLED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        expected = isinstance(error, USER_ERRORS)
        text = str(error) if expected else f"{error!r} was not expected; --debug shows where it arose."
        _say(text, error)
        return FAILED
    return 0


def _say(text: str, error: BaseException) -> None:
    """The text, and the notes of the error: where the frames of a run that ended early are."""
    # The status tells as much where the terminal is gone.
    with suppress(OSError):
        sys.stderr.write("".join(f"{line}\n" for line in (text, *getattr(error, "__notes__", ()))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wanvideo", description="Wan video diffusion from saved ComfyUI workflows.")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a workflow (UI or API form) and write its video")
    _add_run_arguments(run)
    run.set_defaults(command=_run)

    demo = commands.add_parser("demo", help="make the demo's talking video")
    demo.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="assignments")
    demo.add_argument("--speech", type=Path, metavar="FILE", help="your own speech, in any sound format")
    demo.add_argument("--portrait", type=Path, metavar="FILE", help="your own drawn frontal face (demo/MODEL_CARD.md)")
    demo.add_argument("--gpus", type=int, default=1, metavar="N", help="processes that make the video together")
    demo.set_defaults(command=_demo)

    batch = commands.add_parser("batch", help="make many videos, on this host or on a Ray cluster")
    batch_command.add_arguments(batch)
    batch.set_defaults(command=batch_command.run)

    assemble = commands.add_parser("assemble", help="make a video of the frames of a folder")
    assemble.add_argument("folder", type=Path, help="folder with frame_00000.png, ...")
    assemble.add_argument("--fps", type=float, default=25.0, help="frames a second (default: 25)")
    assemble.add_argument("--audio", type=Path, metavar="FILE", help="its sound")
    assemble.add_argument("--out", type=Path, metavar="FILE", help="the video (default: FOLDER.mp4)")
    assemble.set_defaults(command=_assemble)

    bench = commands.add_parser("bench", help="measure speed on random weights, beside peers")
    bench_command.add_arguments(bench)
    bench.set_defaults(command=bench_command.run)

    quality = commands.add_parser("quality", help="measure lip-sync and fidelity of the demo's models by setting")
    quality_command.add_arguments(quality)
    quality.set_defaults(command=quality_command.run)
    for command in (run, demo, batch, quality):
        # Only where it is given, so that it does not undo one before the command's name.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if command is not batch:
            command.add_argument("--out", type=Path, help="folder for results (default: ./output)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")

    models = commands.add_parser("models", help="list the model files that a workflow needs")
    models.add_argument("workflow", type=Path)
    models.add_argument("--models", type=Path, help="folder with ComfyUI's model folders (default: ./models)")
    models.set_defaults(command=_models)

    plan = commands.add_parser("plan", help="say how much GPU memory a workflow takes, and what to swap")
    plan.add_argument("workflow", type=Path)
    plan.add_argument("--vram", type=float, metavar="GIB", help="memory of the GPU that it shall run on")
    plan.add_argument("--models", type=Path, help="folder with ComfyUI's model folders (default: ./models)")
    plan.set_defaults(command=_plan)

    doctor = commands.add_parser("doctor", help="say which quantization and attention options run here, and why not")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    doctor.add_argument("--tokens", type=int, default=0, metavar="N", help="try third-party attention on N tokens")
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    doctor.set_defaults(command=_doctor)

    inspect = commands.add_parser("inspect", help="say what a model file is")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(command=_inspect)
    return parser


def _add_run_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument("workflow", type=Path)
    run.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="assignments")
    run.add_argument("--bypass", action="append", default=[], metavar="NODE", help="pass a node's input through")
    run.add_argument("--mute", action="append", default=[], metavar="NODE", help="leave a node out")
    run.add_argument("--models", type=Path, help="folder with ComfyUI's model folders (default: ./models)")
    run.add_argument("--input", type=Path, help="folder of pictures and sounds (default: ./input)")
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that make the video together")
    run.add_argument(
        "--ray", metavar="ADDRESS", help="take them from a Ray cluster: host:port, auto, or local to start one here"
    )
    run.add_argument("--check", action="store_true", help="say all that is wrong with the workflow, and run nothing")
    run.add_argument("--allow-path", action="append", default=[], type=Path, metavar="DIR")


def _run(options: argparse.Namespace) -> None:
    folders = Folders(models=options.models, inputs=options.input, outputs=options.out, allowed=options.allow_path)
    _execute(options.workflow, folders, options)


def _demo(options: argparse.Namespace) -> None:
    from ..demo import INPUT, MODELS, WORKFLOW
    from ..demo.own_files import connect, folders

    allowed = folders(options.speech, options.portrait)
    options.bypass, options.mute, options.check, options.ray = [], [], False, None
    own = Folders(models=MODELS, inputs=INPUT, outputs=options.out, allowed=allowed)
    _execute(WORKFLOW, own, options, partial(connect, speech=options.speech, portrait=options.portrait))


def _execute(
    workflow: Path, folders: Folders, options: argparse.Namespace, change: Callable[[Prompt], None] | None = None
) -> None:
    edits = Edits(assignments=options.assignments, bypass=options.bypass, mute=options.mute, change=change)
    job = Job(workflow=workflow.absolute(), folders=folders, edits=edits)
    if options.gpus < 1:
        raise ValueError(f"--gpus must be 1 or more, not {options.gpus}.")
    if (options.gpus > 1 or options.ray is not None) and not options.check:
        from .several import run_on_several

        show(run_on_several(job, options.gpus, options.device, options.ray))
    else:
        _run_alone(job, options)
    if without := job.without():
        log.warning("Bypassed by --bypass, so that the result lacks what they do: %s.", ", ".join(without))


def _run_alone(job: Job, options: argparse.Namespace) -> None:
    host = job.folders.host(StandaloneHost, options.device)
    set_host(host)
    with on_stop(partial(_interrupt, host)):
        _run_job(job, host, check=options.check)


def _run_job(job: Job, host: StandaloneHost, *, check: bool) -> None:
    from .runner import Runner

    runner = Runner(*job.prompt(), host)
    if check:
        runner.check()
        sys.stdout.write("Nothing is wrong with the workflow that can be seen before it runs.\n")
        return
    show(lines(runner.run()))


def _interrupt(host: StandaloneHost) -> None:
    """The first Ctrl-C stops at the next step; another one stops what takes too long to get there."""
    if host.cancel.is_set():
        raise KeyboardInterrupt
    host.cancel.set()
    # The signal may have come in the middle of another line, or because the terminal is gone.
    with suppress(RuntimeError, OSError):
        sys.stderr.write("Stopping at the next step; once more stops at once.\n")


def _assemble(options: argparse.Namespace) -> None:
    from .frame_folder import FrameFolder
    from .media import Encoding, read_audio, write_video

    if not 1 <= options.fps <= MOST_FPS:
        raise ValueError(f"--fps must be between 1 and {MOST_FPS}, not {options.fps}.")
    folder = options.folder.absolute()
    path = options.out or folder.with_name(f"{folder.name}.mp4")
    if path.exists():
        raise ValueError(f"{path} is there already: give another name with --out.")
    sound = None if options.audio is None else read_audio(options.audio)
    write_video(path, FrameFolder(folder), Encoding(fps=options.fps), sound)
    sys.stdout.write(f"{path}\n")


def _models(options: argparse.Namespace) -> None:
    from .. import NODE_CLASS_MAPPINGS
    from .core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
    from .graph import load
    from .model_list import needed_models, report

    host = StandaloneHost(models=options.models)
    set_host(host)
    prompt = load(options.workflow, {**STAND_INS, **NODE_CLASS_MAPPINGS})
    sys.stdout.writelines(f"{line}\n" for line in report(prompt, needed_models(prompt, host)))


def _plan(options: argparse.Namespace) -> None:
    from .. import NODE_CLASS_MAPPINGS
    from .core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
    from .graph import load
    from .memory_plan import plan
    from .published_headers import PlanningHost

    if options.vram is not None and options.vram <= 0:
        raise ValueError(f"--vram must be more than 0 GiB, not {options.vram:g}.")
    host, classes = PlanningHost(models=options.models, device="cpu"), {**STAND_INS, **NODE_CLASS_MAPPINGS}
    set_host(host)
    for line in plan(load(options.workflow, classes), classes, host, vram=options.vram):
        sys.stdout.write(f"{line}\n")


def _doctor(options: argparse.Namespace) -> None:
    from .. import doctor

    device = StandaloneHost(device=options.device).device()
    findings = doctor.examine(device, options.tokens)
    shown = doctor.as_json(findings, device) if options.json else doctor.as_table(findings, device)
    sys.stdout.write(f"{shown}\n")


def _inspect(options: argparse.Namespace) -> None:
    from ..wanvideo.inspect import describe

    sys.stdout.write(f"{describe(options.file, SYSTEMS)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
