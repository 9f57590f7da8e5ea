"""kill -9 of one rank, of one worker and of the driver during a batch of four: all four videos end as if undisturbed.

Real processes of `wanvideo batch`, here and on Ray where it is installed. BATCH_KILLS=1 runs them, as `make kills`
does; BATCH_KILL_SEED draws the moments.
"""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_cluster

if not sys.platform.startswith("linux"):
    pytest.skip("/proc is Linux's", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("BATCH_KILLS"), reason="kills a batch of videos: make kills"),
]
RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")
CHANCE = random.Random(int(os.environ.get("BATCH_KILL_SEED", "0")))
MARK = "WANVIDEO_BATCH_KILLS"
# Ten windows: a video takes longer than the latest moment of a kill, on a machine with nothing else to do, too.
FRAMES, LATEST = 45, 1.5


class Batch:
    """The four jobs in a folder, and the command that makes them. options: of the command, behind those of the demo."""

    def __init__(self, folder, *options, ray=False):
        self.jobs, self.names = small_cluster.write_jobs(folder, FRAMES)
        self.out, self.log = folder / "out", folder / "log.txt"
        words = small_cluster.command(self.jobs, self.out)
        if not ray:
            del words[words.index("--ray") : words.index("--ray") + 2]
        self.command = [sys.executable, "-m", "wanvideo_wrapper.headless.cli", *words, *options]

    def start(self):
        # x264 reads memory that it did not write: filled, it codes equal frames alike.
        environment = {**os.environ, MARK: str(self.out), "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "1"}
        with self.log.open("a") as log:
            return subprocess.Popen(self.command, cwd=small_cluster.ROOT, env=environment, stderr=log, stdout=log)

    def finish(self, process):
        assert process.wait(400) == 0, self.log.read_text()[-3000:]
        return small_cluster.videos(self.out, self.names)

    def done(self):
        return len(list(self.out.glob("*/result.json")))

    def wait_for(self, process, look):
        """What `look` finds as soon as one job is done and others run; and then a moment within one of these."""
        end = time.monotonic() + 300
        while time.monotonic() < end:
            assert process.poll() is None, f"it ended before: {self.log.read_text()[-3000:]}"
            if self.done() and (seen := look(process)):
                time.sleep(CHANCE.uniform(0, LATEST))
                return seen
            time.sleep(0.02)
        raise AssertionError("nothing to kill")


def children(pid):
    """Processes that this one started."""
    return [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]


def forked(pid):
    """What the fork server of a process made."""
    return [worker for server in children(pid) for worker in children(server)]


def workers(driver):
    return forked(driver.pid)


def ranks(driver):
    return [rank for worker in forked(driver.pid) for rank in forked(worker)]


def actors(driver):
    (mark,) = (item for item in small_cluster.read(driver.pid, "environ") if item.startswith(f"{MARK}="))
    return small_cluster.actors(mark)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Videos of one process each, and of two ranks each, to which nothing happens."""
    made = {}

    def get(*options):
        if options not in made:
            batch = Batch(tmp_path_factory.mktemp("undisturbed"), *options)
            made[options] = batch.finish(batch.start())
            assert len({video.tobytes() for video in made[options]}) == 4
        return made[options]

    return get


@pytest.mark.parametrize(
    ("look", "options", "ray"),
    [
        pytest.param(workers, (), False, id="worker"),
        pytest.param(actors, (), True, id="ray_worker", marks=RAY),
        pytest.param(ranks, ("--gpus-per-job", "2", "--workers", "1"), False, id="rank"),
        pytest.param(None, (), False, id="driver"),
        pytest.param(None, (), True, id="driver_of_ray", marks=RAY),
    ],
)
def test_four_videos_end_as_if_nothing_had_happened(undisturbed, tmp_path, look, options, ray):
    batch = Batch(tmp_path, *options, ray=ray)
    process = batch.start()
    if look is None:
        batch.wait_for(process, workers if not ray else actors)
        process.kill()
        assert process.wait() == -signal.SIGKILL and 1 <= batch.done() < 4
        process = batch.start()
    else:
        os.kill(CHANCE.choice(batch.wait_for(process, look)), signal.SIGKILL)
    made = batch.finish(process)
    log = batch.log.read_text()
    assert look is None or "is tried again: " in log
    for video, whole in zip(made, undisturbed(*options), strict=True):
        assert np.array_equal(video, whole)
    before = {path: path.stat().st_mtime_ns for path in batch.out.rglob("talking_*/*")}
    batch.finish(batch.start())
    assert "4 of 4 jobs are done already" not in log
    assert {path: path.stat().st_mtime_ns for path in batch.out.rglob("talking_*/*")} == before
