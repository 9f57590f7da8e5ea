"""Starts the ranks of one video as processes of this host. They meet through a folder, where each says how it ended."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from .processes import end_with_parent, hear, start, start_context
from .rank import Outcome, Rank, Work, join, meeting, outcome
from .watch import HELD_GPU, LAST_WORDS_SECONDS, START_SECONDS, STOPS, death, ended, watch

FAILED = 2


def devices(device: str, count: int) -> tuple[str, ...]:
    """The device of each rank. Raises ValueError where there are fewer GPUs, or one was named."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return ("cpu",) * count
    if device != "cuda":
        raise ValueError(f"Several GPUs are the first {count} of CUDA: give --device cuda, not {device}.")
    have = torch.cuda.device_count()
    if count > have:
        raise ValueError(f"{count} GPUs were asked for, but torch sees {have}: give a smaller number.")
    return tuple(f"cuda:{index}" for index in range(count))


def launch(work: Work, *, count: int, device: str = "auto", start_seconds: float = START_SECONDS) -> Sequence[str]:
    """Run `work`, which must be picklable, on `count` ranks, and wait for it; returns the first rank's lines.

    Raises ValueError where there are too few GPUs, and as `watch`.
    """
    places = devices(device, count)
    with tempfile.TemporaryDirectory(prefix="wanvideo_ranks_") as folder:
        team = _Processes(work, places, Path(folder))
        try:
            watch(team, start_seconds)
            return team.outcome(0).shown
        finally:
            team.end()


class _Processes:
    """A team of them."""

    remedy = HELD_GPU

    def __init__(self, work: Work, places: tuple[str, ...], folder: Path) -> None:
        self.count = len(places)
        self._folder = folder
        context = start_context(gpu=torch.device(places[0]).type != "cpu")
        arguments = [(rank, places, str(folder), work) for rank in range(self.count)]
        self._processes: list[BaseProcess] = [context.Process(target=_rank, args=a, daemon=True) for a in arguments]
        for process in self._processes:
            start(process)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def wait(self, seconds: float) -> bool:
        running = self._running()
        if running:
            wait(running, timeout=seconds)
        return bool(running)

    def late(self) -> Sequence[int]:
        return [rank for rank in range(self.count) if not _started(self._folder, rank).exists()]

    def failure(self) -> Exception | None:
        if not any(process.exitcode for process in self._processes):
            return None
        self.wait(LAST_WORDS_SECONDS)
        failed = []
        for rank, process in enumerate(self._processes):
            if process.exitcode and not _ended(self._folder, rank).exists():
                return RuntimeError(death(rank, self.count, ended(process.exitcode)))
            if process.exitcode:
                failed.append(rank)
        first = min(failed, key=lambda rank: _ended(self._folder, rank).stat().st_mtime_ns)
        return self.outcome(first).error()

    def stop(self) -> None:
        self._processes[0].terminate()

    def outcome(self, rank: int) -> Outcome:
        """Of one that has ended."""
        return Outcome(**json.loads(_ended(self._folder, rank).read_text()))

    def _running(self) -> list[int]:
        return [process.sentinel for process in self._processes if process.exitcode is None]


def _started(folder: Path, rank: int) -> Path:
    return folder / f"started_{rank}"


def _ended(folder: Path, rank: int) -> Path:
    return folder / f"ended_{rank}"


def _rank(rank: int, places: tuple[str, ...], folder: str, work: Work) -> None:
    """A rank's process. The starting process decides what signals mean: SIGTERM, sent to the first one, is its stop."""
    cancel = threading.Event()
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: cancel.set())
    hear()
    end_with_parent()
    result = outcome(partial(_work, rank, places, folder, work, cancel))
    partial_file = Path(folder) / f".ended_{rank}"
    partial_file.write_text(json.dumps(asdict(result)))
    partial_file.rename(_ended(Path(folder), rank))
    sys.exit(0 if result.error() is None else FAILED)


def _work(rank: int, places: tuple[str, ...], folder: str, work: Work, cancel: threading.Event) -> Sequence[str]:
    ranks = join(rank, len(places), places[rank], meeting(folder, len(places)))
    _started(Path(folder), rank).touch()
    return work(Rank(places[rank], ranks, cancel))
