"""Finished frames of a long video: 8-bit in memory, or pictures in a folder from which a broken run goes on.

While a run is unfinished its folder holds `.unfinished/`: run.json (what the run is, and how far it got), the tensors
that the last finished window hands on, and a lock that dies with the process. A window counts once run.json says so;
the order of writing is frames, tensors, run.json, each renamed into place, so that a crash leaves a whole state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .fingerprint import digest
from .safetensors_file import SafetensorsFile, write_tensors

log = logging.getLogger("wanvideo")

UNFINISHED, RECORD, LOCK = ".unfinished", "run.json", "lock"
FORMAT = 2
FOLDER_ENDING = "_output"


class Reached(NamedTuple):
    """How far a run got: finished windows, and the tensors that the last of them hands on."""

    windows: int = 0
    handover: Mapping[str, Tensor] | None = None


# Bytes a value of a frame takes at the end: 8 bits, and the 32 that other nodes read.
BYTES_A_VALUE = 1 + 4


def check_room(total: int, height: int, width: int, *, remedy: str) -> None:
    """Raises ValueError, ending in the remedy, if so many frames cannot be held by this machine's main memory."""
    needed, there = total * height * width * 3 * BYTES_A_VALUE, _main_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"{total} frames of {width}x{height} take {needed / 2**30:.0f} GB of main memory and this machine has "
            f"{there / 2**30:.0f}: {remedy}."
        )


def _main_memory() -> int | None:
    """Bytes of main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class MemoryFootage:
    """The frames as 8-bit tensors, at most `total`."""

    output_path = ""

    def __init__(self, total: int) -> None:
        self.total = total
        self.frames = 0
        self._video: Tensor | None = None

    def open(self) -> Reached:
        """Always from the start."""
        return Reached()

    def close(self) -> None:
        """Nothing to let go of."""

    def add(self, images: Tensor) -> None:
        """Take frames [n, H, W, 3] in 0..1."""
        frames = to_bytes(images[: self.total - self.frames])
        if self._video is None:
            # Pages that are not written yet take no memory, and nothing is joined at the end.
            self._video = torch.empty(self.total, *frames.shape[1:], dtype=torch.uint8)
        self._video[self.frames : self.frames + len(frames)] = frames
        self.frames += len(frames)

    def finish_window(self, windows: int, handover: Mapping[str, Tensor]) -> None:
        """Nothing is kept for later."""

    def finish(self) -> None:
        """Nothing to tidy up."""

    def video(self) -> Tensor:
        """All frames [n, H, W, 3] in -1..1; the 8-bit ones are let go."""
        video, self._video = self._video, None
        return video.float().div_(127.5).sub_(1)

    def rescue(self, folder: Path) -> Path:
        """Write the frames so far for a run that cannot go on; returns where: `folder`, or one that has room.

        Raises OSError if they can be written nowhere.
        """
        try:
            return self._written(folder)
        except OSError as error:
            elsewhere = Path(tempfile.gettempdir()) / folder.name
            log.warning("%s The frames go to %s instead.", error, elsewhere.parent)
            return self._written(elsewhere)

    def _written(self, folder: Path) -> Path:
        # Two runs may end in the same second.
        names = (folder if n == 1 else folder.with_name(f"{folder.name}_{n}") for n in count(1))
        folder = next(name for name in names if not name.exists())
        folder.mkdir(parents=True)
        try:
            for index in range(self.frames):
                write_frame(folder, index, self._video[index])
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder


class FolderFootage:
    """The frames as frame_00000.png, ... in `folder`, at most `total`. inputs: fingerprints of the run by name."""

    def __init__(self, folder: Path, total: int, inputs: Mapping[str, str]) -> None:
        self.total = total
        self.frames = 0
        self.folder = folder
        self.output_path = str(folder)
        self._inputs = dict(inputs)
        self._lock: object | None = None

    def open(self) -> Reached:
        """Find out where to go on: in this folder, or in one beside it that an equal run left (it is renamed).

        Anything else in this folder is set aside under another name. Raises ValueError if another process writes here.
        """
        if (self.folder / UNFINISHED).is_dir():
            if not self._acquire(self.folder):
                raise ValueError(f"Another process is writing to {self.folder}: wait for it, or choose another folder.")
            self.close()
        for candidate in (self.folder, *self._beside()):
            reached = self._taken(candidate)
            if reached is not None:
                return reached
        self._explain(_record(self.folder))
        self._set_aside()
        self._acquire(self.folder)
        self._save_record(0, None)
        return Reached()

    def _beside(self) -> list[Path]:
        """Folders that the node may have named for earlier runs, the newest first."""
        parent = self.folder.parent
        if not parent.is_dir() or FOLDER_ENDING not in self.folder.name:
            return []
        return sorted((p for p in parent.glob(f"*{FOLDER_ENDING}*") if p != self.folder and p.is_dir()), reverse=True)

    def _taken(self, candidate: Path) -> Reached | None:
        """Where to go on if this folder is an equal run's that no process works on; it then has this one's name."""
        if not _equal(_record(candidate), self._inputs) or not self._acquire(candidate):
            return None
        # Its process may have ended, or another one may have taken it, before it was locked.
        record = _record(candidate)
        if not _equal(record, self._inputs):
            self._let_go(candidate, record)
            return None
        try:
            handover = _whole(candidate, record)
        except (OSError, ValueError) as error:
            log.warning("The unfinished run in %s is not continued: %s", candidate, error)
            self.close()
            return None
        if candidate != self.folder:
            self._set_aside()
            if os.name == "nt":
                # Windows renames no folder with an open file in it.
                self.close()
            candidate.rename(self.folder)
            if os.name == "nt" and not self._acquire(self.folder):
                return None
        return self._resumed(record, handover)

    def _let_go(self, candidate: Path, record: dict[str, object] | None) -> None:
        """Leave a folder that has become another's, without the lock that was made there."""
        self.close()
        if record is None:
            shutil.rmtree(candidate / UNFINISHED, ignore_errors=True)
            with suppress(OSError):
                candidate.rmdir()

    def _acquire(self, folder: Path) -> bool:
        from filelock import FileLock, Timeout

        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / UNFINISHED / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._lock = lock
        return True

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _resumed(self, record: dict[str, object], handover: Mapping[str, Tensor] | None) -> Reached:
        self.frames = record["frames"]
        for path in (*self.folder.glob("frame_*.png"), *self.folder.glob("frame_*.part")):
            number = path.stem.removeprefix("frame_")
            # Other files with such a name are the user's.
            if number.isdecimal() and (path.suffix == ".part" or int(number) >= self.frames):
                path.unlink()
        log.info("Going on in %s after %d finished windows (%d frames).", self.folder, record["windows"], self.frames)
        return Reached(record["windows"], handover)

    def _explain(self, record: dict[str, object] | None) -> None:
        if record is None:
            return
        before = record["inputs"]
        changed = [name for name in self._inputs if before.get(name) != self._inputs[name]]
        why = f"other inputs ({', '.join(changed)})" if changed else "files that are missing or damaged"
        log.info("The unfinished run in %s has %s, so it is not continued.", self.folder, why)

    def _set_aside(self) -> None:
        """Give an earlier run's folder another name: ComfyUI keeps the path of a node whose inputs did not change."""
        if not any(self.folder.glob("frame_*.png")):
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
            return
        names = (self.folder.with_name(f"{self.folder.name}_{number}") for number in count(1))
        earlier = next(name for name in names if not name.exists())
        self.folder.rename(earlier)
        log.info("The frames of the run before are now in %s.", earlier)

    def add(self, images: Tensor) -> None:
        """Write frames [n, H, W, 3] in 0..1."""
        for frame in to_bytes(images[: self.total - self.frames]):
            write_frame(self.folder, self.frames, frame)
            self.frames += 1

    def finish_window(self, windows: int, handover: Mapping[str, Tensor]) -> None:
        """Record that so many windows are finished; a later run goes on from here.

        Raises OSError where that cannot be written; the run can then go on from the window before.
        """
        inner = self.folder / UNFINISHED
        state = inner / f"window_{windows:05d}.safetensors"
        try:
            write_tensors(state, handover)
            self._save_record(windows, state.name)
        except OSError as error:
            raise OSError(
                f"Window {windows} could not be recorded in {inner} ({error.strerror or error}); the frames are there: "
                "make room, and run again to go on."
            ) from error
        for old in inner.glob("window_*"):
            if old != state:
                old.unlink()

    def _save_record(self, windows: int, state: str | None) -> None:
        inner = self.folder / UNFINISHED
        record = {
            "format": FORMAT, "inputs": self._inputs, "windows": windows, "frames": self.frames, "state": state,
            "state_digest": None if state is None else _file_digest(inner / state),
        }  # fmt: skip
        record["digest"] = digest(record)
        path = inner / RECORD
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1))
        _flush(partial)
        partial.replace(path)

    def finish(self) -> None:
        """The video is whole: from now on the folder holds nothing but its frames."""
        (self.folder / UNFINISHED / RECORD).unlink()
        self.close()
        # An equal run may look for a lock there at this moment; it finds no record, and tidies up.
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        log.info("All %d frames are in %s.", self.frames, self.folder)

    def video(self) -> Tensor:
        """One black frame [1, 64, 64, 3] in -1..1; the video is in the folder."""
        return torch.full((1, 64, 64, 3), -1.0)

    def rescue(self, folder: Path) -> Path:
        """They are on disk already."""
        return self.folder


Footage = MemoryFootage | FolderFootage


def to_bytes(images: Tensor) -> Tensor:
    """Frames in 0..1 as 8-bit."""
    return (images * 255).round().to(torch.uint8)


def write_frame(folder: Path, index: int, frame: Tensor) -> None:
    """One 8-bit frame [H, W, 3] as PNG, under its name once it is whole. Raises OSError where it cannot be written."""
    from PIL import Image

    path = folder / f"frame_{index:05d}.png"
    partial = path.with_suffix(".part")
    try:
        Image.fromarray(frame.numpy()).save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if not folder.exists():
            raise OSError(
                f"Frame {index} could not be written: the folder {folder} is gone, and the frames before it with it."
            ) from error
        raise OSError(
            f"Frame {index} could not be written to {folder} ({error.strerror or error}); the frames before it are "
            "there: make room, and run again to go on."
        ) from error


def _record(folder: Path) -> dict[str, object] | None:
    """What run.json says, None where there is none that this version wrote as it is."""
    try:
        record = json.loads((folder / UNFINISHED / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    written = record.pop("digest", None)
    try:
        return record if digest(record) == written else None
    except (TypeError, RecursionError):
        return None


def _equal(record: dict[str, object] | None, inputs: Mapping[str, str]) -> bool:
    return record is not None and record["inputs"] == inputs


def _whole(folder: Path, record: dict[str, object]) -> dict[str, Tensor] | None:
    """What the last finished window hands on. Raises ValueError or OSError if a file is missing, or not as written.

    Of frames, empty ones are seen: a power cut leaves them.
    """
    for index in range(record["frames"]):
        path = folder / f"frame_{index:05d}.png"
        if not path.stat().st_size:
            raise ValueError(f"{path.name} is empty.")
    if record["state"] is None:
        return None
    path = folder / UNFINISHED / record["state"]
    if _file_digest(path) != record["state_digest"]:
        raise ValueError(f"{path.name} is damaged.")
    file = SafetensorsFile(path)
    # Copies: Windows deletes no file that tensors are mapped to.
    return {name: file.read(name).clone() for name in file.tensors}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
