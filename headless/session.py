"""A process that runs one job after the other and keeps the models that the next one shares."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..host import StandaloneHost, set_host
from .job import Job, lines
from .runner import Outputs, Runner


class SessionHost(StandaloneHost):
    """A host whose cache of encoded prompts all jobs share."""

    shared_cache: Path

    def cache_dir(self) -> Path:
        """Beside the jobs' folders."""
        return self.shared_cache


@dataclass
class Session:
    """Picklable until its first job. gpus: how many make one video; more than one loads the models anew for each.

    cache: folder of encoded prompts.
    """

    device: str
    gpus: int
    cache: Path

    def __post_init__(self) -> None:
        self._loaded: dict[str, Outputs] = {}

    def run(self, job: Job) -> Sequence[str]:
        """What the job's outputs show. Raises whatever its nodes raise."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        if self.gpus > 1:
            from .several import run_on_several

            return run_on_several(job, self.gpus, self.device)
        host = job.folders.host(SessionHost, self.device)
        host.shared_cache = self.cache
        set_host(host)
        return lines(Runner(*job.prompt(), host, self._loaded).run())
