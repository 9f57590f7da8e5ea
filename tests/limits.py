"""Limits of one fuzzed case: ten seconds, and 300 MB of memory beside twice its files."""

import ctypes
import faulthandler
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

SLOWEST, MOST_MEMORY = 10, 300 * 2**20
STDERR = []


def pytest_configure(config):
    """Output is not captured yet: what is written here is seen though the process ends in the middle of a test."""
    if not STDERR:
        STDERR.append(os.dup(2))


def memory(name):
    """VmRSS, which this process has, or VmHWM, the most that it has had since `forget_peak`; 0 where none tells."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak():
    """What was freed goes back to the system first: taken again from the heap, it would not count."""
    if sys.platform == "linux":
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def interrupted(seconds=SLOWEST):
    """Fails a body that takes longer. Where it is deaf to signals, the process ends soon after, and says where it was.

    The failure is no Exception, so that no `except OSError` of what is tried takes it for an answer.
    """

    def late(*_):
        pytest.fail(f"This case takes longer than {seconds} s.")

    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=STDERR[0])
    alarms = hasattr(signal, "setitimer")
    if alarms:
        before = signal.signal(signal.SIGALRM, late)
        # Again every second: what is raised in a finalizer is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        if alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def bounded(*paths, most=MOST_MEMORY):
    """Fails a body whose peak of memory is above twice these files, or folders, and `most` bytes."""
    size = sum(file.stat().st_size for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    forget_peak()
    before = memory("VmRSS")
    yield
    taken = memory("VmHWM") - before
    assert taken <= 2 * size + most, f"This case takes {taken / 2**20:.0f} MB for {size} bytes."


@contextmanager
def limited(*paths, most=MOST_MEMORY):
    """Both limits of a case that reads these files or folders."""
    with interrupted(), bounded(*paths, most=most):
        yield
