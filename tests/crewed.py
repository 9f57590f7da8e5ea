"""What the workers of the crew tests hold."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from limits import PATIENCE
from wanvideo_wrapper.distributed.crew import End, attempt
from wanvideo_wrapper.distributed.watch import STOPS
from wanvideo_wrapper.headless.attempts import Delivering
from wanvideo_wrapper.headless.batch import entries, run_jobs
from wanvideo_wrapper.headless.job import Folders
from wanvideo_wrapper.headless.results import Results

# As of when this process imported anything of the tests.
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "")


class Imported:
    """Shows the GPUs that its process saw when it imported this, and the signals that do not reach it."""

    def run(self, job):
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, []) if hasattr(signal, "pthread_sigmask") else ()
        return [VISIBLE, *(number.name for number in STOPS if number in masked)]


@dataclass
class Waits:
    """A job "wait" says that it has begun, and takes as long as anybody waits."""

    begun: Path

    def run(self, job):
        if job == "wait":
            self.begun.touch()
            time.sleep(PATIENCE)
        return []


@dataclass
class Echo:
    """Shows a job and its process. A job "die" kills the process unless its file is there, "bad" and "odd" fail."""

    folder: Path

    def run(self, job):
        # A try's folder lies in that of the job's name.
        name = job if isinstance(job, str) else job.folders.outputs.parent.name
        if name == "die" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "bad":
            raise ValueError("The file is of another kind.")
        if name == "odd":
            raise RuntimeError("an illegal address")
        if not isinstance(job, str):
            (job.folders.outputs / "video.txt").write_text(" ".join(job.edits.assignments))
        return [f"{name} {os.getpid()}"]


class Here:
    """A crew of one worker, which is this process: what kills the job kills the driver."""

    size = 1

    def __init__(self, work):
        self._work = work

    def begin(self, worker, job):
        self._end = End(worker, *attempt(self._work, job))

    def next(self):
        return self._end


def four_jobs(folder):
    """A batch of four, of which the third kills its process once."""
    (folder / "graph.json").write_text("{}")
    rows = [{"workflow": "graph.json", "id": name} for name in ("one", "two", "die", "four")]
    (folder / "jobs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return entries(folder / "jobs.jsonl", Results(str(folder / "out")), Folders())


def drive(folder):
    run_jobs(four_jobs(folder), Here(Delivering(Echo(folder))))
