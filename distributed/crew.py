"""Workers that do one job after the other: processes of this host, or Ray's actors on many (`ray_crew.py`).

Both are this small: begin a job on an idle worker, wait for the next end. A worker that died is replaced.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

from .processes import VISIBLE, end_with_parent, hear, send, start, start_context

# How long an idle worker may take to end by itself.
END_SECONDS = 5.0


class Work(Protocol):
    """What a worker holds: made here, used there, so that it must be picklable."""

    def run(self, job: object) -> Sequence[str]:
        """Do the job."""


@dataclass(frozen=True)
class End:
    """How a job ended. failure: the reason, None where it went well; again: whether another try may end otherwise."""

    worker: int
    shown: Sequence[str] = ()
    failure: str | None = None
    again: bool = False


class Crew(Protocol):
    """`size` workers, counted from 0."""

    size: int

    def begin(self, worker: int, job: object) -> None:
        """Give an idle worker a job."""

    def next(self) -> End:
        """Wait until a busy worker has ended its job."""

    def close(self) -> None:
        """End all workers."""


def attempt(work: Work, job: object) -> tuple[Sequence[str], str | None, bool]:
    """Shown lines, failure, and whether it may be tried again: what is wrong with files or options stays wrong."""
    try:
        return work.run(job), None, False
    except (ValueError, OSError, ImportError) as error:
        return (), str(error), False
    except Exception as error:
        traceback.print_exc()
        return (), f"{type(error).__name__}: {error}", True


class LocalCrew:
    """Processes of this host. environments: variables of each worker; one with a GPU needs those that it sees."""

    def __init__(self, work: Work, environments: Sequence[dict[str, str]]) -> None:
        self.size = len(environments)
        self._work = work
        self._environments = environments
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}
        self._busy: set[int] = set()

    def begin(self, worker: int, job: object) -> None:
        """Starts the process where there is none."""
        if worker not in self._workers:
            self._workers[worker] = self._started(self._environments[worker])
        self._busy.add(worker)
        send(self._workers[worker][1], job)

    def next(self) -> End:
        """The first that answers, or whose pipe was closed by its death, be it before the job came."""
        pipes = {self._workers[worker][1]: worker for worker in self._busy}
        pipe = wait(list(pipes))[0]
        worker = pipes[pipe]
        self._busy.discard(worker)
        try:
            shown, failure, again = pipe.recv()
        except (EOFError, ConnectionResetError):
            shown, failure, again = (), "its process died", True
        if again:
            # After a fault of the GPU a process is of no more use.
            self._end(worker)
        return End(worker, shown, failure, again)

    def close(self) -> None:
        """Ends those that are idle, and kills the others: finished jobs are on disk."""
        for worker in list(self._workers):
            process, pipe = self._workers[worker]
            if worker not in self._busy:
                # Then it returns, and what it shares with this process is given back in order.
                pipe.close()
                process.join(END_SECONDS)
            self._end(worker)

    def _started(self, environment: dict[str, str]) -> tuple[BaseProcess, Connection]:
        context = start_context(gpu=VISIBLE in environment)
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._work, theirs, environment))
        start(process, environment)
        theirs.close()
        return process, mine

    def _end(self, worker: int) -> None:
        process, pipe = self._workers.pop(worker)
        process.kill()
        process.join()
        pipe.close()


def _serve(work: Work, pipe: Connection, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hear()
    os.environ.update(environment)
    end_with_parent()
    # The end of the pipe is that of the crew.
    with suppress(EOFError):
        while True:
            pipe.send(attempt(work, pipe.recv()))
