"""Processes for GPUs are new ones, that know their GPUs from the start, and no signal ends them while they import."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker

import crewed
import pytest
from limits import PATIENCE
from wanvideo_wrapper.distributed import launch, processes
from wanvideo_wrapper.distributed.crew import LocalCrew
from wanvideo_wrapper.distributed.processes import VISIBLE, hear, start_context
from wanvideo_wrapper.distributed.watch import STOPS

MASK = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"


def test_what_has_a_gpu_is_no_fork():
    """Whoever imports comfy-kitchen has asked for GPUs, which forks of it can then not use."""
    assert start_context(gpu=True).get_start_method() == "spawn"
    assert start_context(gpu=False).get_start_method() in ("forkserver", "spawn")


def test_a_worker_knows_its_gpus_before_it_imports_anything(monkeypatch):
    monkeypatch.setenv(VISIBLE, "3")
    crew = LocalCrew(crewed.Imported(), [{VISIBLE: "5,6"}])
    try:
        crew.begin(0, "job")
        assert crew.next().shown == ["5,6"]
    finally:
        crew.close()
    assert os.environ[VISIBLE] == "3"
    monkeypatch.delenv(VISIBLE)
    with processes._variables({VISIBLE: "1"}):
        assert os.environ[VISIBLE] == "1"
    assert VISIBLE not in os.environ


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_signals_wait_until_a_process_hears():
    """What is started inherits the mask; this process gets back what it had."""

    def held():
        return subprocess.run([sys.executable, "-c", MASK], capture_output=True, text=True, check=True).stdout.strip()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with processes._signals_held():
        assert held() == str(sorted({*map(int, before), *map(int, STOPS)}))
        hear()
        assert not set(STOPS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before and held() == str(sorted(map(int, before)))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_signals_wait_for_the_first_process_too(monkeypatch, capfd):
    """Which starts the tracker of what processes share, and that unblocks some signals."""
    tracker = resource_tracker._resource_tracker
    monkeypatch.setattr(tracker, "_fd", None)
    monkeypatch.setattr(tracker, "_pid", None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process = start_context(gpu=True).Process(target=subprocess.call, args=([sys.executable, "-c", MASK],))
    processes.start(process)
    process.join()
    assert tracker._fd is not None
    tracker._stop()
    assert capfd.readouterr().out.strip() == str(sorted({*map(int, before), *map(int, STOPS)}))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_a_rank_hears_before_it_works(monkeypatch, tmp_path):
    heard = []

    def noting(work):
        heard.append(set(STOPS) & signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return launch.Outcome()

    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launch, "end_with_parent", lambda: None)
    monkeypatch.setattr(launch, "outcome", noting)
    with processes._signals_held(), pytest.raises(SystemExit):
        launch._rank(0, ("cpu",), str(tmp_path), None)
    assert heard == [set()]


def wait_for(path):
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def test_an_idle_worker_ends_by_itself_and_a_busy_one_is_killed(tmp_path):
    crew = LocalCrew(crewed.Waits(tmp_path / "begun"), [{}, {}])
    crew.begin(0, "at once")
    crew.next()
    crew.begin(1, "wait")
    idle, busy = (process for process, _ in crew._workers.values())
    wait_for(tmp_path / "begun")
    crew.close()
    assert (idle.exitcode, busy.exitcode) == (0, -signal.SIGKILL)
