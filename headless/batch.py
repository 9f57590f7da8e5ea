"""`wanvideo batch`: many videos of one file of jobs, on the workers of this host or of a Ray cluster.

A line of the file is a JSON object: workflow (a path, relative to the file), set (NODE.INPUT -> value), bypass and mute
(lists of nodes), id. Each job that ended has a folder of its name in the results' folder; `result.json` in it,
written last, says that it is done and for which job. So whatever is ended, the driver included, the same command does
only what is missing, and a talking video with an output_path goes on at its unfinished window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..distributed.crew import Crew, End, LocalCrew
from ..distributed.processes import VISIBLE
from .attempts import Delivering, Delivery
from .job import Edits, Folders, Job
from .results import Results
from .session import Session

log = logging.getLogger("wanvideo")

RESULT, MANIFEST = "result.json", "manifest.jsonl"
KEYS = {"id", "workflow", "set", "bypass", "mute"}
NAME = re.compile(r"[\w.-]+")
TRIES = 3


@dataclass
class Entry:
    """A line of the file: its name, the job, what tells it from others, and how often it was begun."""

    name: str
    job: Job
    digest: str
    results: Results
    tries: int = 0

    @property
    def models(self) -> tuple[object, ...]:
        """Jobs where this is equal load, most likely, the same models."""
        return self.job.workflow, *(line for line in self.job.edits.assignments if "Loader" in line)

    def done(self) -> dict[str, object] | None:
        """What result.json says, if it is of this job and its files are there."""
        try:
            result = json.loads(self.results.read(f"{self.name}/{RESULT}"))
            fine = result["digest"] == self.digest and set(result["files"]) <= set(self.results.files(self.name))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if fine else None

    def finish(self, seconds: float) -> None:
        """Write result.json, and sweep what tries that were given up have left."""
        names = [name for name in self.results.files(self.name) if name != RESULT]
        text = json.dumps({"digest": self.digest, "seconds": seconds, "files": names}, indent=1)
        self.results.write(f"{self.name}/{RESULT}", text)
        shutil.rmtree(self.results.unfinished / self.name, ignore_errors=True)


def entries(path: Path, results: Results, folders: Folders) -> list[Entry]:
    """The jobs of the file. Raises ValueError, naming the line, for what is no job."""
    found: dict[str, Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _entry(json.loads(line), path.parent, results, folders)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        if entry.name in found:
            raise ValueError(f"{path.name}, line {number}: another job is called '{entry.name}'; give them ids.")
        found[entry.name] = entry
    if not found:
        raise ValueError(f"{path.name} has no jobs; a line is {{'workflow': 'graph.json', 'set': {{}}}} in JSON.")
    return list(found.values())


def _entry(values: object, base: Path, results: Results, folders: Folders) -> Entry:
    if not isinstance(values, dict) or not isinstance(values.get("workflow"), str) or set(values) - KEYS:
        raise ValueError(f"a job is an object with a 'workflow' and no keys but {', '.join(sorted(KEYS))}.")
    changes = values.get("set", {})
    if not isinstance(changes, dict):
        raise ValueError("'set' is an object of NODE.INPUT and value.")
    workflow = (base / values["workflow"]).resolve()
    lines = tuple(f"{name}={_text(value)}" for name, value in changes.items())
    edits = Edits(assignments=lines, bypass=tuple(values.get("bypass", ())), mute=tuple(values.get("mute", ())))
    told = json.dumps([workflow.read_text(encoding="utf-8"), lines, edits.bypass, edits.mute])
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    name = str(values.get("id", f"{workflow.stem}_{digest}"))
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ValueError(f"the id '{name}' cannot be a folder's name: use letters, digits, '_', '-' and '.'.")
    return Entry(name, Job(workflow=workflow, folders=folders, edits=edits), digest, results)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass
class Batch:
    """The jobs that are missing, given to idle workers: first those whose models a worker has."""

    crew: Crew
    waiting: list[Entry]
    running: dict[int, tuple[Entry, float]] = field(default_factory=dict)
    has: dict[int, tuple[object, ...]] = field(default_factory=dict)
    failed: list[tuple[Entry, str]] = field(default_factory=list)

    def run(self) -> None:
        """Until all have ended."""
        while self.waiting or self.running:
            for worker in range(self.crew.size):
                if worker not in self.running and self.waiting:
                    self._begin(worker)
            self._take(self.crew.next())

    def _begin(self, worker: int) -> None:
        entry = next((e for e in self.waiting if e.models == self.has.get(worker)), self.waiting[0])
        self.waiting.remove(entry)
        entry.tries += 1
        self.running[worker], self.has[worker] = (entry, time.time()), entry.models
        log.info("Worker %d begins '%s'.", worker, entry.name)
        self.crew.begin(worker, Delivery(entry.name, entry.job, entry.results))

    def _take(self, end: End) -> None:
        entry, began = self.running.pop(end.worker)
        if end.failure is None:
            seconds = round(time.time() - began, 1)
            entry.finish(seconds)
            log.info("'%s' is done after %.1f seconds.", entry.name, seconds)
            return
        self.has.pop(end.worker)
        if end.again and entry.tries < TRIES:
            log.warning("'%s' is tried again: %s.", entry.name, end.failure.rstrip("."))
            self.waiting.insert(0, entry)
            return
        log.error("'%s' failed: %s", entry.name, end.failure)
        self.failed.append((entry, end.failure))


def run_jobs(jobs: Sequence[Entry], crew: Crew) -> None:
    """Those that are missing. Raises RuntimeError, naming them, where some failed; the others are done."""
    batch = Batch(crew, [entry for entry in jobs if entry.done() is None])
    log.info("%d of %d jobs are done already.", len(jobs) - len(batch.waiting), len(jobs))
    batch.run()
    if batch.failed:
        reasons = "".join(f"\n{entry.name}: {reason}" for entry, reason in batch.failed)
        raise RuntimeError(f"{len(batch.failed)} of {len(jobs)} jobs failed; run the same again to try them.{reasons}")


def write_manifest(jobs: Iterable[Entry], results: Results) -> None:
    """A line a job: its id, whether it is done, its files from the folder on."""
    rows = []
    for entry in jobs:
        result = entry.done()
        files = [] if result is None else [f"{entry.name}/{name}" for name in result["files"]]
        rows.append({"id": entry.name, "done": result is not None, "digest": entry.digest, "files": files})
    results.write(MANIFEST, "".join(f"{json.dumps(row)}\n" for row in rows))


def _crew(options: argparse.Namespace, results: Results) -> Crew:
    if options.device not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"Workers of a batch have GPUs of their own: give --device cuda or cpu, not {options.device}, and leave "
            f"others out by {VISIBLE}."
        )
    gpu = options.device != "cpu" and (options.ray is not None or torch.cuda.is_available())
    device = options.device if options.device != "auto" else "cuda" if gpu else "cpu"
    session = Delivering(Session(device, options.gpus_per_job, results.folder / "cache"))
    if options.ray is not None:
        from ..distributed.ray_crew import RayCrew

        gpus = options.gpus_per_job if gpu else 0
        return RayCrew(session, address=options.ray, gpus=gpus, workers=options.workers)
    if not gpu:
        return LocalCrew(session, [{}] * (options.workers or 1))
    have, each = torch.cuda.device_count(), options.gpus_per_job
    count = options.workers or have // each
    if not 0 < count * each <= have:
        raise ValueError(f"{count or 1} workers of {each} GPUs each were asked for, but torch sees {have} GPUs.")
    # Names of the GPUs that this process was left, of which torch's numbers are places.
    seen = (os.environ.get(VISIBLE) or ",".join(map(str, range(have)))).split(",")
    shares = (",".join(seen[first : first + each]) for first in range(0, count * each, each))
    return LocalCrew(session, [{VISIBLE: gpus} for gpus in shares])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument("jobs", type=Path, help="a file with a job a line (docs/scale.md)")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: host:port, auto, or local to start one here")
    parser.add_argument("--gpus-per-job", type=int, default=1, metavar="N", help="GPUs that make a video together")
    parser.add_argument("--workers", type=int, metavar="N", help="jobs at a time (default: as many as there is room)")
    parser.add_argument("--models", type=Path, help="folder with ComfyUI's model folders (default: ./models)")
    parser.add_argument("--input", type=Path, help="folder of pictures and sounds (default: ./input)")
    parser.add_argument("--out", default="output", help="folder or fsspec URL for results (default: ./output)")


def run(options: argparse.Namespace) -> None:
    """The command. Raises ValueError for what is no job, RuntimeError where jobs failed."""
    if options.gpus_per_job < 1 or (options.workers is not None and options.workers < 1):
        raise ValueError("--gpus-per-job and --workers are 1 or more.")
    results = Results(options.out)
    folders = Folders(models=options.models, inputs=options.input).absolute()
    jobs = entries(options.jobs, results, folders)
    crew = _crew(options, results) if any(entry.done() is None for entry in jobs) else None
    try:
        if crew is not None:
            run_jobs(jobs, crew)
    finally:
        if crew is not None:
            crew.close()
        with suppress(OSError):
            results.unfinished.rmdir()
        write_manifest(jobs, results)
        log.info("The manifest is %s/%s.", results.place.rstrip("/"), MANIFEST)
