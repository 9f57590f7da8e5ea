"""The limits of a fuzzed case end a case that hangs, whatever it catches, and name one that takes too much memory."""

import platform
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from limits import MOST_MEMORY, bounded, interrupted

needs_alarms = pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")


@needs_alarms
@pytest.mark.parametrize("limits", [{"seconds": 0.1}, {"patience": 0.1}], ids=["computes", "waits"])
def test_a_case_that_hangs_is_interrupted(limits):
    with pytest.raises(pytest.fail.Exception, match="longer than 0.1 s"), interrupted(**limits):
        while True:
            try:
                time.sleep(0 if "seconds" in limits else 60)
            except Exception:
                continue


@needs_alarms
def test_time_that_others_take_does_not_count():
    with interrupted(0.2):
        time.sleep(0.4)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_that_was_given_back_counts(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    with bounded(path):
        np.ones(MOST_MEMORY // 2, np.uint8)
    with pytest.raises(AssertionError, match="MB for 1000 bytes"), bounded(path):
        np.ones(MOST_MEMORY + 2**24, np.uint8)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose heap it is about")
def test_memory_that_others_freed_counts(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    freed = [bytearray(100_000) for _ in range(5000)]
    above = [bytearray(100) for _ in range(20_000)]  # so that the heap cannot shrink
    del freed
    with pytest.raises(AssertionError, match="MB for 1000 bytes"), bounded(path):
        np.ones(MOST_MEMORY + 2**24, np.uint8)
    assert above


def test_generated_inputs_have_no_deadline():
    """What hypothesis has by default fails on a busy machine: 200 ms for an input, a second for what it draws."""
    assert settings().deadline is settings().database is None
    assert set(settings().suppress_health_check) == set(HealthCheck)
