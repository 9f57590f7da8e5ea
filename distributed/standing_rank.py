"""A rank that stays: it samples one request after the other, and keeps the models that the next one shares.

It is started by `standing.py` and talks with it through a pipe: a Start and Orders come, Bar, Shown and Ended go.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ..host import set_host
from ..wanvideo.sampling import sample
from . import recipes
from .host import RankHost
from .rank import join, meeting
from .watch import STOPS

REQUEST, RESULT = "request.pt", "result.pt"


@dataclass(frozen=True)
class Start:
    """What a rank is told first. places: the device of each; folder: to meet in; outputs, reserved: of the host."""

    rank: int
    places: tuple[str, ...]
    folder: str
    outputs: Path
    reserved: int


@dataclass(frozen=True)
class Order:
    """A request lies in the folder, and the result belongs there. living: models that may be asked for again."""

    folder: Path
    living: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """The rank has started, or run an order; or it cannot."""

    error: BaseException | None = None


class StandingHost(RankHost):
    """A rank's host whose progress is shown by the process that asked."""

    reserved: int

    def reserved_memory(self) -> int:
        """As ComfyUI's command line says."""
        return self.reserved


def serve(number: str) -> None:
    """A rank's process. number: the pipe's file descriptor. It ends when the other end of the pipe closes."""
    # Ctrl-C in a terminal reaches all of its processes: the one that started this decides.
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    pipe = Connection(int(number))
    start: Start = pipe.recv()
    logging.basicConfig(level=logging.ERROR if start.rank else logging.INFO, format="%(message)s", stream=sys.stderr)
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, orders), daemon=True).start()
    try:
        host = _host(start, pipe)
        pipe.send(Ended())
        while True:
            _run(orders.get(), host)
            pipe.send(Ended())
    except Exception as error:
        _send_error(pipe, error)
    # Whoever waits for this rank in a collective must not see it go before the reason was read.
    threading.Event().wait()


def _read(pipe: Connection, orders: queue.SimpleQueue[Order]) -> None:
    while True:
        try:
            orders.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)


def _host(start: Start, pipe: Connection) -> StandingHost:
    host = StandingHost(outputs=start.outputs, device=start.places[start.rank])
    count = len(start.places)
    host.ranks = join(start.rank, count, start.places[start.rank], meeting(start.folder, count))
    host.tell, host.reserved = pipe.send, start.reserved
    set_host(host)
    return host


def _run(order: Order, host: StandingHost) -> None:
    recipes.keep(order.living)
    # Written by the process that started this one, into a folder of its own.
    request = torch.load(order.folder / REQUEST, map_location="cpu", mmap=True, weights_only=False)
    result = sample(request, host)
    if host.ranks.leads:
        torch.save(result, order.folder / RESULT)
    host.free_memory()


def _send_error(pipe: Connection, error: Exception) -> None:
    try:
        # An error with arguments of its own may be written and not be read.
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    pipe.send(Ended(error))
