"""Starts the ranks of one video on this host and watches them: what goes wrong with one ends all, in one sentence.

The starting process computes nothing, so that it can end ranks that wait for one that died. Ranks meet through a file.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ..host import CancelledError
from .processes import end_with_parent, start_context
from .ranks import ProcessRanks

# Importing torch takes long on a cold disk; a card that another process has hung never answers.
START_SECONDS = 180.0
# A step may take longer than anybody waits: then the ranks are ended within it.
CANCEL_SECONDS = 1.5
# How long after the first rank others may take to say what they met.
LAST_WORDS_SECONDS = 0.5
COLLECTIVE_MINUTES = 30
FAILED, CANCELLED = 2, 130
STOPS = (signal.SIGINT, signal.SIGTERM)
# NVLink's multicast needs rights that containers often lack, and then hangs.
NO_MULTICAST = ("NCCL_NVLS_ENABLE", "0")


@dataclass(frozen=True)
class Rank:
    """What the work of a rank is given. device: its own."""

    device: str
    ranks: ProcessRanks


Work = Callable[[Rank], None]


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


def launch(work: Work, *, count: int, device: str = "auto", start_seconds: float = START_SECONDS) -> None:
    """Run `work`, which must be picklable, on `count` ranks, and wait for it.

    Raises ValueError where there are too few GPUs, CancelledError after Ctrl-C or SIGTERM, and RuntimeError with the
    first rank's reason where one fails, dies or does not start.
    """
    places = devices(device, count)
    os.environ.setdefault(*NO_MULTICAST)
    context = start_context()
    with tempfile.TemporaryDirectory(prefix="wanvideo_ranks_") as folder:
        arguments = [(rank, places, folder, work) for rank in range(count)]
        processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        try:
            _Watch(processes, Path(folder), start_seconds).to_the_end()
        finally:
            for process in processes:
                process.kill()
                process.join()


class _Watch:
    """One look after the other at processes that should all end well."""

    def __init__(self, processes: list[BaseProcess], folder: Path, start_seconds: float) -> None:
        self._processes = processes
        self._folder = folder
        self._start_by = time.monotonic() + start_seconds
        self._start_seconds = start_seconds
        self._end_by: float | None = None

    def to_the_end(self) -> None:
        """Until all have ended; raises as `launch`."""
        with self._stops():
            while running := [p for p in self._processes if p.exitcode is None]:
                self._check_start()
                wait([p.sentinel for p in running], timeout=0.1)
                if any(p.exitcode for p in self._processes):
                    self._fail()
                if self._end_by is not None and time.monotonic() > self._end_by:
                    raise CancelledError
        if any(p.exitcode for p in self._processes):
            self._fail()

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """The first rank is told to stop at its next step; it has little time."""

        def stop(*_: object) -> None:
            if self._end_by is None:
                self._end_by = time.monotonic() + CANCEL_SECONDS
                self._processes[0].terminate()

        before = {number: signal.signal(number, stop) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _check_start(self) -> None:
        if time.monotonic() < self._start_by:
            return
        late = [rank for rank in range(len(self._processes)) if not _started(self._folder, rank).exists()]
        if late:
            raise RuntimeError(late_start(late, len(self._processes), self._start_seconds))

    def _fail(self) -> None:
        if self._end_by is not None:
            raise CancelledError
        wait([p.sentinel for p in self._processes if p.exitcode is None], timeout=LAST_WORDS_SECONDS)
        for rank, process in enumerate(self._processes):
            if process.exitcode is not None and process.exitcode < 0:
                raise RuntimeError(death(rank, len(self._processes), process.exitcode))
        if any(p.exitcode == CANCELLED for p in self._processes):
            raise CancelledError
        words = sorted(self._folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
        raise RuntimeError(words[0].read_text() if words else "A rank ended without a reason; see the lines above.")


def late_start(late: Sequence[int], count: int, seconds: float) -> str:
    """What is said of ranks that do not start."""
    return (
        f"Rank {', '.join(map(str, late))} of {count} did not start within {seconds:.0f} seconds: see with nvidia-smi "
        "whether another process holds its GPU, or use fewer GPUs."
    )


def death(rank: int, count: int, status: int) -> str:
    """What is said of a rank that ended by a signal, or without a word."""
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return (
        f"Rank {rank} of {count} died ({how}); the others were ended. Finished windows of a talking video are on disk "
        "if it has an output_path: run the same again to go on."
    )


def _started(folder: Path, rank: int) -> Path:
    return folder / f"started_{rank}"


def _rank(rank: int, places: tuple[str, ...], folder: str, work: Work) -> None:
    """A rank's process. The starting process decides what signals mean; the first rank's work may change that."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    try:
        ranks = join(rank, places, folder)
        _started(Path(folder), rank).touch()
        work(Rank(places[rank], ranks))
    except CancelledError:
        sys.exit(CANCELLED)
    except Exception as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
        if not expected:
            traceback.print_exc()
        partial = Path(folder) / f".error_{rank}"
        partial.write_text((str(error) if expected else repr(error)) + notes)
        partial.rename(partial.with_name(f"error_{rank}"))
        sys.exit(FAILED)


def join(rank: int, places: Sequence[str], folder: str) -> ProcessRanks:
    """Meet the other ranks through a folder. places: the device of each."""
    import torch.distributed as dist

    device = torch.device(places[rank])
    options: dict[str, object] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(places)))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(f"{folder}/store", len(places)),
        rank=rank,
        world_size=len(places),
        timeout=datetime.timedelta(minutes=COLLECTIVE_MINUTES),
        **options,
    )
    dist.barrier()
    return ProcessRanks(device)
