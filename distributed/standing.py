"""Several GPUs from inside ComfyUI: processes that stay from run to run, as long as somebody holds the object.

ComfyUI's own process computes nothing of a run. It writes the request to a file, follows what the ranks say, and ends
them all where one dies, fails or is too slow, or the user cancels; the next run starts new ones.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import recipes
from .launch import devices
from .processes import send
from .standing_rank import REQUEST, RESULT, Ended, Order, Start
from .told import Terminal
from .watch import LAST_WORDS_SECONDS, START_SECONDS, death, ended, late_start

if TYPE_CHECKING:
    from ..host import Host

# ComfyUI loads the pack by its path, under a name that cannot be imported, and its main module starts a server when
# multiprocessing imports it anew. So a rank gets the package by name and folder, without running its nodes.
PROGRAM = """
import importlib, sys, types
name, folder, pipe = sys.argv[1:]
sys.modules[name] = package = types.ModuleType(name)
package.__path__ = [folder]
importlib.import_module(name + ".distributed.standing_rank").serve(pipe)
"""
PACKAGE = __name__.rpartition(".distributed.")[0]
FOLDER = Path(__file__).resolve().parents[1]
# How long killed processes may take to leave their GPUs.
END_SECONDS = 1.0


class StandingRanks:
    """`count` ranks on this host, started by the first run. device: "cuda", "cpu" or "auto".

    Raises ValueError where there are fewer GPUs, or where processes cannot be given a pipe.
    """

    def __init__(self, count: int, device: str = "auto", *, start_seconds: float = START_SECONDS) -> None:
        if sys.platform == "win32":
            raise ValueError("Several GPUs need Linux: NCCL, by which they talk, does not run on Windows.")
        self._places = devices(device, count)
        self._start_seconds = start_seconds
        self._team: _Team | None = None

    def run(self, request: object, host: Host) -> tuple[dict[str, object], dict[str, object]]:
        """Sample: LATENT dicts of the result and of the last estimate of the clean latents.

        Raises what a rank raises, RuntimeError where one dies or does not start, ValueError for a request with models
        that cannot go to them, and the host's exception on cancellation.
        """
        host.make_room()
        with tempfile.TemporaryDirectory(prefix="wanvideo_request_") as name:
            folder = Path(name)
            _write(request, folder / REQUEST)
            try:
                if self._team is not None and self._team.lost():
                    self.close()
                if self._team is None:
                    self._team = _Team(self._places, host)
                    self._team.follow(host, start_seconds=self._start_seconds)
                self._team.order(Order(folder, recipes.living()))
                self._team.follow(host)
            except BaseException:
                self.close()
                raise
            return torch.load(folder / RESULT, mmap=True, weights_only=True)

    def close(self) -> None:
        """End the processes; a later run starts others."""
        if self._team is not None:
            self._team.end()
        self._team = None


class _Team:
    """Processes that were started, and a pipe to each."""

    def __init__(self, places: tuple[str, ...], host: Host) -> None:
        meeting = tempfile.TemporaryDirectory(prefix="wanvideo_ranks_")
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        # Also when nobody holds the object any more, and when the interpreter ends.
        self.end = weakref.finalize(self, _end, self._processes, meeting)
        for rank in range(len(places)):
            mine, theirs = Pipe()
            number = theirs.fileno()
            command = (sys.executable, "-P", "-c", PROGRAM, PACKAGE, str(FOLDER), str(number))
            self._processes.append(subprocess.Popen(command, pass_fds=(number,)))
            theirs.close()
            self._pipes.append(mine)
            send(mine, Start(rank, places, meeting.name, host.output_dir(), host.reserved_memory()))

    def lost(self) -> bool:
        """Whether one of them has died since it last answered."""
        return any(process.poll() is not None for process in self._processes)

    def order(self, order: Order) -> None:
        """Every rank is to run this."""
        for pipe in self._pipes:
            send(pipe, order)

    def follow(self, host: Host, *, start_seconds: float | None = None) -> None:
        """Until every rank has ended what it does. start_seconds: within which it must."""
        last = None if start_seconds is None else time.monotonic() + start_seconds
        busy = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        with ExitStack() as stack:
            terminal = Terminal(host.progress, stack)
            while busy:
                host.check_cancelled()
                if last is not None and time.monotonic() > last:
                    raise RuntimeError(late_start(sorted(busy.values()), len(self._pipes), start_seconds))
                for pipe in wait(list(busy), timeout=0.1):
                    said = self._said(pipe)
                    if not isinstance(said, Ended):
                        terminal.take(said)
                    elif said.error is None:
                        del busy[pipe]
                    else:
                        self._raise_death(LAST_WORDS_SECONDS)
                        raise said.error

    def _said(self, pipe: Connection) -> object:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            # It closed its pipe and has yet to end, which takes long with much memory, and in a hung driver forever.
            self._raise_death(LAST_WORDS_SECONDS)
            how = "its pipe was closed"
            raise RuntimeError(death(self._pipes.index(pipe), len(self._pipes), how)) from None

    def _raise_death(self, seconds: float) -> None:
        """What others say of a rank that died is not the reason."""
        end = time.monotonic() + seconds
        while True:
            for rank, process in enumerate(self._processes):
                if process.poll() is not None:
                    raise RuntimeError(death(rank, len(self._processes), ended(process.returncode))) from None
            if time.monotonic() >= end:
                return
            time.sleep(0.02)


def _write(request: object, path: Path) -> None:
    try:
        torch.save(request, path, pickle_module=recipes)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Something is connected to the sampler that cannot go to the other GPUs ({error}): disconnect "
            "WanVideoMultiGPU from the model loader."
        ) from error


def _end(processes: Sequence[subprocess.Popen], meeting: tempfile.TemporaryDirectory[str]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    meeting.cleanup()
