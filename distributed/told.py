"""What the first rank shows, where another process has the terminal: messages, and who makes and takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..host import Progress

Tell = Callable[[object], None]


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
class Logged:
    """A line of the log."""

    name: str
    level: int
    text: str


class ToldProgress:
    """A bar of the process that is told."""

    def __init__(self, tell: Tell, total: int, label: str) -> None:
        self._tell = tell
        self._bar = Bar(total, label)

    def __enter__(self) -> Self:
        self._tell(self._bar)
        return self

    def __exit__(self, *failure: object) -> None:
        self._tell(Bar())

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """Of the latents, only what will be seen is told."""
        if preview is not None:
            middle = preview.shape[1] // 2
            preview = preview[:, middle : middle + 1].detach().float().cpu()
        self._tell(Shown(done, note, None if preview is None else preview.numpy()))


class ToldLog(logging.Handler):
    """The log of the process that is told."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """With the traceback, if there is one. As of any handler, nothing is raised for a line that is wrong."""
        try:
            self._tell(Logged(record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)


class Terminal:
    """The process that is told. progress: makes its bars; `stack` closes those that a lost rank leaves open."""

    def __init__(self, progress: Callable[[int, str], Progress], stack: ExitStack) -> None:
        self._progress = progress
        self._stack = stack
        self._open: list[tuple[Progress, ExitStack]] = []

    def take(self, said: object) -> None:
        """A bar begins or ends, the last one that began moves, or a line is logged."""
        match said:
            case Logged():
                logging.getLogger(said.name).log(said.level, "%s", said.text)
            case Shown():
                preview = None if said.preview is None else torch.from_numpy(said.preview)
                self._open[-1][0].update(said.done, note=said.note, preview=preview)
            case Bar(total=None):
                self._open.pop()[1].close()
            case Bar():
                own = self._stack.enter_context(ExitStack())
                self._open.append((own.enter_context(self._progress(said.total, said.label)), own))
