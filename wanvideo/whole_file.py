"""Files that appear whole or not at all, under a number that no other process takes."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = re.compile(r"\..+\.(?P<host>[0-9a-z-]+)\.(?P<process>\d+)\.[0-9a-f]{8}\.part")


def _host() -> str:
    return re.sub(r"[^0-9a-z-]", "-", socket.gethostname().lower()) or "host"


@contextmanager
def partial_file(folder: Path, name: str) -> Iterator[Path]:
    """A name of this process alone to write to, in `folder` (made if missing); nothing is left of it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    path = folder / f".{name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(partial: Path, next_name: Callable[[], Path]) -> Path:
    """Give a whole file the first name that is free; `next_name` is asked again when another process was faster."""
    while True:
        path = next_name()
        try:
            os.link(partial, path)
        except FileExistsError:
            continue
        except OSError:
            # Some file systems have no links: the name is taken first, and then filled.
            with suppress(FileExistsError):
                path.open("xb").close()
                partial.replace(path)
                return path
            continue
        return path


def sweep(folder: Path) -> None:
    """Remove what processes of this machine left half written when they were killed."""
    for path in folder.glob(".*.part"):
        match = PART.fullmatch(path.name)
        if match and match["host"] == _host() and not _lives(int(match["process"])):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if os.name == "nt":
        # There, signal 0 would reach the process as Ctrl-C.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
