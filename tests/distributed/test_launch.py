"""Ranks that end well, fail, die, never start, or are stopped: no other outlives them, and the reason is a sentence."""

import os
import signal
import threading
import time
from functools import partial
from multiprocessing import forkserver

import launched
import pytest
from wanvideo_wrapper.distributed import launch as launching
from wanvideo_wrapper.distributed import watch as watching
from wanvideo_wrapper.distributed.launch import devices, launch
from wanvideo_wrapper.distributed.ranks import passes_at_once
from wanvideo_wrapper.distributed.watch import STOPS, on_stop, watch
from wanvideo_wrapper.host import CancelledError


def run(work, folder, **options):
    return launch(partial(work, folder), count=2, device="cpu", **options)


def test_ranks_meet(tmp_path):
    assert run(launched.adds, tmp_path) == ["3"]
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["3 cpu", "3 cpu"]


def test_the_reason_of_the_first_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"^The file is of another kind; choose another\.$"):
        run(launched.fails, tmp_path)


def test_a_rank_that_dies_ends_all(tmp_path):
    with pytest.raises(RuntimeError, match=r"^Rank 1 of 2 died \(SIGKILL\)"):
        run(launched.dies, tmp_path)


def test_the_start_is_bounded(tmp_path):
    with pytest.raises(RuntimeError, match="Rank 0, 1 of 2 did not start within 0 seconds"):
        run(launched.never_ends, tmp_path, start_seconds=0.0)


class Endless:
    """A team that does not listen, by a clock of its own."""

    count, remedy = 2, ""

    def __init__(self):
        self.now, self.asked, self.stopped = 0.0, None, None

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        if self.now > 10 and self.asked is None:
            self.asked = self.now
            signal.raise_signal(signal.SIGTERM)
        return True

    def late(self):
        return ()

    def failure(self):
        return None

    def stop(self):
        self.stopped = self.now


def test_a_stop_takes_less_than_two_seconds(monkeypatch):
    team = Endless()
    monkeypatch.setattr(watching, "time", team)
    with pytest.raises(CancelledError):
        watch(team)
    assert team.asked <= team.stopped <= team.now < team.asked + 2


def test_a_stop_does_not_wait_for_the_step(tmp_path):
    """Signals reach all processes, the one that forks the ranks, too, where a terminal or a service manager sends them.

    The stop is the last one; those before it have ended nothing.
    """
    server = forkserver._forkserver
    # One that another test has started may have been started otherwise.
    server._stop()

    def stop():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            for pid in (server._forkserver_pid, *(int(path.name) for path in tmp_path.iterdir())):
                os.kill(pid, number)
        os.kill(os.getpid(), getattr(signal, "SIGHUP", signal.SIGTERM))

    # nohup, which pytest may run under, ignores one.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(CancelledError):
            run(launched.never_ends, tmp_path)
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in STOPS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_stop_breaks_is_no_failure():
    """A rank that dies of it, or loses another one, before it comes to say that it was stopped."""

    class Stopped:
        count, remedy, stopped = 2, "", False

        def wait(self, seconds):
            os.kill(os.getpid(), signal.SIGTERM)
            return True

        def failure(self):
            return RuntimeError("Rank 1 of 2 died") if self.stopped else None

        def stop(self):
            self.stopped = True

    with pytest.raises(CancelledError):
        watch(Stopped())


@pytest.mark.parametrize(
    ("jobs", "ranks", "at_once"), [(1, 2, 1), (2, 2, 2), (3, 2, 1), (2, 3, 1), (3, 4, 1), (2, 8, 2), (3, 6, 3)]
)
def test_passes_run_beside_each_other_where_ranks_divide_by_them(jobs, ranks, at_once):
    assert passes_at_once(jobs, ranks) == at_once


def test_a_signal_that_is_ignored_stays_so():
    """By nohup, and for jobs that a script leaves in the background."""
    before, asked = signal.signal(signal.SIGINT, signal.SIG_IGN), []
    try:
        with on_stop(lambda: asked.append(1)):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_more_gpus_than_there_are_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 2)
    assert devices("cuda", 2) == ("cuda:0", "cuda:1")
    with pytest.raises(ValueError, match="4 GPUs were asked for, but torch sees 2"):
        devices("cuda", 4)
    with pytest.raises(ValueError, match="--device cuda, not cuda:1"):
        devices("cuda:1", 2)
