"""Where a job of a batch works until it is done: each try has a folder of its own, which then gets the job's name.

A worker can outlive its driver, and go on with a job that the next driver gives to another. Whoever begins a job takes
the folders of earlier tries away in one step: what still runs there can neither write into the new one nor publish.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..wanvideo.footage import UNFINISHED
from .job import Job
from .results import Results

if TYPE_CHECKING:
    from ..distributed.crew import Work

OWNED = ".owned"


@dataclass(frozen=True)
class Delivery:
    """A job, its name, and where its results go."""

    name: str
    job: Job
    results: Results


@dataclass
class Delivering:
    """Work on deliveries."""

    work: Work

    def run(self, delivery: Delivery) -> Sequence[str]:
        """What the work shows. Raises RuntimeError where another try of the job began meanwhile."""
        folder = begin(delivery.results.unfinished / delivery.name)
        shown = self.work.run(in_folder(delivery.job, folder))
        end(folder)
        delivery.results.take(delivery.name, folder)
        return shown


def in_folder(job: Job, folder: Path) -> Job:
    """The job with its results in this folder."""
    return replace(job, folders=replace(job.folders, outputs=folder))


def begin(place: Path) -> Path:
    """A try's folder in `place`: of earlier tries it has the videos that can go on, and nothing else."""
    folder = _new(place)
    folder.mkdir(parents=True)
    (folder / OWNED).touch()
    for earlier in [path for path in place.iterdir() if path != folder]:
        try:
            taken = earlier.rename(_new(place))
        except FileNotFoundError:
            # It was published at this moment.
            continue
        for frames in _unfinished(taken):
            target = folder / frames.relative_to(taken)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                frames.rename(target)
        shutil.rmtree(taken, ignore_errors=True)
    return folder


def end(folder: Path) -> None:
    """Leave what is to be published. Raises RuntimeError where the folder was taken away."""
    for frames in _unfinished(folder):
        shutil.rmtree(frames, ignore_errors=True)
    try:
        (folder / OWNED).unlink()
    except FileNotFoundError:
        # The nodes may have made it again.
        with suppress(OSError):
            shutil.rmtree(folder)
        raise RuntimeError("another worker has begun this job; its result is the one that counts.") from None


def _new(place: Path) -> Path:
    return place / secrets.token_hex(8)


def _unfinished(folder: Path) -> list[Path]:
    """Folders of frames whose run has not ended."""
    return [path.parent for path in folder.rglob(UNFINISHED) if path.is_dir()]
