"""Ranks of one video, as who started them sees them: what goes wrong with one ends all, in one sentence.

The starting process computes nothing, so that it can end ranks that wait for one that died.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..host import CancelledError

# Importing torch takes long on a cold disk; a card that another process has hung never answers.
START_SECONDS = 180.0
# A step may take longer than anybody waits: then the ranks are ended within it.
CANCEL_SECONDS = 1.5
# How long after the first rank others may take to say what they met.
LAST_WORDS_SECONDS = 0.5
LOOK_SECONDS = 0.1
HELD_GPU = "see with nvidia-smi whether another process holds its GPU, or use fewer GPUs."
# Ctrl-C; what service managers and container hosts stop a run with; what a closed terminal sends (Windows has none).
STOPS = (signal.SIGINT, signal.SIGTERM, *filter(None, (getattr(signal, "SIGHUP", None),)))


class Team(Protocol):
    """Ranks that were started. remedy: what to do about those that do not start."""

    count: int
    remedy: str

    def wait(self, seconds: float) -> bool:
        """Until something happens, no longer than this; whether any of them is still at work."""

    def late(self) -> Sequence[int]:
        """Those that have not met the others yet."""

    def failure(self) -> Exception | None:
        """Why the first that failed did, if one has."""

    def stop(self) -> None:
        """The first rank is to stop at its next step."""


def watch(team: Team, start_seconds: float = START_SECONDS) -> None:
    """Until all have ended well.

    Raises CancelledError after a signal that stops a run, and RuntimeError with the first rank's reason where one
    fails, dies or does not start.
    """
    start_by, end_by, asked = time.monotonic() + start_seconds, None, threading.Event()
    with on_stop(asked.set):
        running = True
        while running:
            if time.monotonic() > start_by and (late := team.late()):
                raise RuntimeError(late_start(late, team.count, start_seconds, team.remedy))
            running = team.wait(LOOK_SECONDS)
            failure = team.failure()
            if failure is not None:
                if end_by is not None and not isinstance(failure, CancelledError):
                    raise CancelledError("Cancelled.")
                raise failure
            if asked.is_set() and end_by is None:
                end_by = time.monotonic() + CANCEL_SECONDS
                team.stop()
            if running and end_by is not None and time.monotonic() > end_by:
                raise CancelledError("Cancelled.")


@contextmanager
def on_stop(act: Callable[[], None]) -> Iterator[None]:
    """Inside, the signals that stop a run call `act`. One that is ignored stays so: nohup and background jobs of a
    script ask for it."""
    stops = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: act()) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def late_start(late: Sequence[int], count: int, seconds: float, remedy: str = HELD_GPU) -> str:
    """What is said of ranks that do not start."""
    return f"Rank {', '.join(map(str, late))} of {count} did not start within {seconds:.0f} seconds: {remedy}"


def death(rank: int, count: int, how: str) -> str:
    """What is said of a rank that ended by a signal, or without a word."""
    return (
        f"Rank {rank} of {count} died ({how}); the others were ended. Finished windows of a talking video are on disk "
        "if it has an output_path: run the same again to go on."
    )


def ended(status: int) -> str:
    """How a process with this exit status died."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
