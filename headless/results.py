"""Where a batch's results go: a folder, or a URL that fsspec knows (s3://bucket/videos, gs://..., file:///...).

Jobs write to folders of their own (`attempts.py`), which get their place here when the job is done. With a URL they lie
in the temporary folder of whichever host runs the job, so that one that was broken off goes on there.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TEMPORARY = "temp"


@dataclass(frozen=True)
class Results:
    """Results at `place`, a path or a URL. Raises ValueError or ImportError for a URL that fsspec cannot serve."""

    place: str

    def __post_init__(self) -> None:
        assert self._files

    @property
    def is_url(self) -> bool:
        """Whether jobs write elsewhere first."""
        return "://" in self.place

    @property
    def folder(self) -> Path:
        """The place, or the temporary folder of this host."""
        if not self.is_url:
            return Path(self.place).absolute()
        return Path(tempfile.gettempdir()) / f"wanvideo_batch_{hashlib.sha256(self.place.encode()).hexdigest()[:16]}"

    @property
    def unfinished(self) -> Path:
        """Below which jobs write; on the file system of the place, if that is a folder."""
        return self.folder / ".unfinished"

    @cached_property
    def _opened(self) -> tuple[AbstractFileSystem, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self.place if self.is_url else str(self.folder))

    @property
    def _files(self) -> AbstractFileSystem:
        return self._opened[0]

    def _path(self, name: str) -> str:
        return f"{self._opened[1].rstrip('/')}/{name}"

    def read(self, name: str) -> str:
        """Raises OSError where there is none."""
        return self._files.cat_file(self._path(name)).decode()

    def write(self, name: str, text: str) -> None:
        """Whole, or not at all: a file system gets it by renaming, and an object store does it so by itself."""
        path = self._path(name)
        if self.is_url:
            self._files.pipe_file(path, text.encode())
            return
        partial = Path(path).with_suffix(".part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)

    def files(self, name: str) -> list[str]:
        """Of a job, from its folder on, but for what may be thrown away."""
        # Other processes and hosts write there.
        self._files.invalidate_cache()
        start = self._path(name) + "/"
        names = sorted(path.removeprefix(start) for path in self._files.find(start))
        return [name for name in names if not name.startswith(f"{TEMPORARY}/")]

    def take(self, name: str, folder: Path) -> None:
        """Give a job's folder its place: in one step, instead of an earlier result, or file by file at the URL.

        Raises RuntimeError, since another try may end otherwise.
        """
        shutil.rmtree(folder / TEMPORARY, ignore_errors=True)
        try:
            if not self.is_url:
                self._rename(folder, self.folder / name)
                return
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                target = self._path(f"{name}/{path.relative_to(folder).as_posix()}")
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
        except Exception as error:
            raise RuntimeError(f"The results in {folder} could not be written to {self.place}: {error}") from error
        shutil.rmtree(folder)

    def _rename(self, folder: Path, target: Path) -> None:
        """No folder can be renamed to one that is not empty: an earlier result goes first."""
        earlier = folder.with_name(secrets.token_hex(8))
        if target.exists():
            target.rename(earlier)
        folder.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
