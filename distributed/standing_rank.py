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
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..host import Progress, set_host
from ..wanvideo.sampling import sample
from . import recipes
from .host import RankHost, SilentProgress
from .launch import STOPS, join

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
class Bar:
    """A progress bar begins; without a total, the last one that began ends."""

    total: int | None = None
    label: str = ""


@dataclass(frozen=True)
class Shown:
    """The bar moves. preview: latents [C, 1, H, W], the frame in the middle."""

    done: int
    note: str
    # A tensor would go as a handle to shared memory, which only processes of one multiprocessing family can open.
    preview: np.ndarray | None


@dataclass(frozen=True)
class Ended:
    """The rank has started, or run an order; or it cannot."""

    error: BaseException | None = None


class ToldProgress:
    """A bar of the process at the other end of the pipe."""

    def __init__(self, pipe: Connection, total: int, label: str) -> None:
        self._pipe = pipe
        self._bar = Bar(total, label)

    def __enter__(self) -> Self:
        self._pipe.send(self._bar)
        return self

    def __exit__(self, *failure: object) -> None:
        self._pipe.send(Bar())

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """Of the latents, only what will be seen goes through the pipe."""
        if preview is not None:
            middle = preview.shape[1] // 2
            preview = preview[:, middle : middle + 1].detach().float().cpu()
        self._pipe.send(Shown(done, note, None if preview is None else preview.numpy()))


class StandingHost(RankHost):
    """A rank's host whose progress is shown by the process that asked."""

    pipe: Connection
    reserved: int

    def progress(self, total: int, label: str = "") -> Progress:
        """Of the first rank."""
        return ToldProgress(self.pipe, total, label) if self.ranks.leads else SilentProgress()

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
    host.ranks = join(start.rank, start.places, start.folder)
    host.pipe, host.reserved = pipe, start.reserved
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
