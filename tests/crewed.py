"""What the workers of the crew tests hold."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Echo:
    """Shows a job and its process. A job "die" kills the process unless its file is there, "bad" and "odd" fail."""

    folder: Path

    def run(self, job):
        name = job if isinstance(job, str) else job.folders.outputs.name
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
