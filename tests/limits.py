"""Limits of one fuzzed case: ten seconds of a processor, and 300 MB of memory beside twice its files.

They hold on a busy machine and in a process that has run thousands of tests: time that others take does not count, nor
does memory that others left.
"""

import ctypes
import faulthandler
import gc
import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

SLOWEST, MOST_MEMORY = 10, 300 * 2**20
# How long anything may take that ends by itself: on a busy machine, twenty times what it takes alone.
PATIENCE = 300
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


def trim():
    """What was freed goes back to the system: taken again from the heap, it would not count."""
    if give := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
        give(0)


@pytest.fixture
def new_objects():
    """In the test, the garbage collector knows only what is made there, and not what others drop late."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def forget_peak():
    if sys.platform == "linux":
        trim()
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def alarm(clock, number, seconds, verb):
    """Fails a body that this clock has run too long for. The failure is no Exception: no `except OSError` takes it."""

    def late(*_):
        pytest.fail(f"This case {verb} longer than {seconds} s.")

    before = signal.signal(number, late)
    # Again every second: what is raised in a finalizer is lost.
    signal.setitimer(clock, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(clock, 0)
        signal.signal(number, before)


@contextmanager
def interrupted(seconds=SLOWEST, patience=PATIENCE):
    """Fails a body that computes longer than `seconds`, or takes longer than `patience`.

    Where it is deaf to signals, the process ends soon after, and says where it was.
    """
    faulthandler.dump_traceback_later(patience + 10, exit=True, file=STDERR[0])
    with ExitStack() as stack:
        stack.callback(faulthandler.cancel_dump_traceback_later)
        if hasattr(signal, "setitimer"):
            stack.enter_context(alarm(signal.ITIMER_PROF, signal.SIGPROF, seconds, "computes"))
            stack.enter_context(alarm(signal.ITIMER_REAL, signal.SIGALRM, patience, "takes"))
        yield


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
