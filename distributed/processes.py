"""How processes of this host are started and told what to do, and that none outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .watch import STOPS

# CUDA reads it once, when a process first asks for GPUs.
VISIBLE = "CUDA_VISIBLE_DEVICES"


def start_context(*, gpu: bool) -> multiprocessing.context.BaseContext:
    """Without a GPU, forks of a process that has imported the package: torch is imported once, not once each.

    With one, new processes. The package's import asks for GPUs (comfy-kitchen's does), and what was forked from a
    process that has asked can use none.
    """
    if gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.fork_server"])
    return context


def start(process: BaseProcess, environment: Mapping[str, str] | None = None) -> None:
    """Start it. One that is no fork has these variables, and no signal stops it before it calls `hear`.

    A terminal sends its signals to all processes: one that is still importing would end with a traceback.
    """
    if not isinstance(process, multiprocessing.context.SpawnProcess):
        process.start()
        return
    with _variables(environment or {}), _signals_held():
        process.start()


def hear() -> None:
    """From now on the signals of a stop reach this process. Those that came before do now."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_held() -> Iterator[None]:
    """What is started inside inherits this; Windows has no such thing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first process that is started would start it, which unblocks signals (Python 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def send(pipe: Connection, message: object) -> None:
    """Tell a process something. Of one that has died nothing is raised here: reading its pipe says so."""
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.send(message)


def end_with_parent() -> None:
    """From now on this process dies when the one that started it does, however that comes about."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
