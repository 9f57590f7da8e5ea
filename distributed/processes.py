"""How processes of this host are started and told what to do, and that none outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait


def start_context() -> multiprocessing.context.BaseContext:
    """Forks from a process that has imported the package and touched no GPU: torch is imported once, not once each."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.fork_server"])
    return context


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
