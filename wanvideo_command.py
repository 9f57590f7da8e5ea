"""The console command. Outside the package, so that Ctrl-C is quiet in the seconds in which that is imported."""

from __future__ import annotations

import os
import signal
import sys

CANCELLED = 130


def main() -> int:
    """Import the package and run the command; returns its exit status."""
    # One that is ignored stays so: nohup and background jobs of a script ask for it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from wanvideo_wrapper.headless.cli import main as command

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _leave(*_: object) -> None:
    """At once: an exception would be lost where a library tries one import after another."""
    os.write(sys.stderr.fileno(), b"Cancelled.\n")
    os._exit(CANCELLED)
