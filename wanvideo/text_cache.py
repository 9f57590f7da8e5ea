"""Encoded prompts on disk, so that the text encoder need not be loaded again for a prompt it has seen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_file import SafetensorsFile, write_tensors

log = logging.getLogger("wanvideo")

EMBEDDING = "embedding"
# How much of a file tells it from others: its start, which holds the header, and a piece of every 8 MB. A matrix of
# UMT5 has at least 16 MB; all of 11 GB would take longer to read than prompts take to encode.
START_BYTES = 2**20
PIECE_BYTES, PIECE_DISTANCE = 2**12, 2**23


class TextCache:
    """safetensors files in a folder, one a prompt and encoder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, prompt: str, encoder: str) -> Path:
        return self._folder / f"{_digest(prompt)}_{_digest(encoder)}.safetensors"

    def load(self, prompt: str, encoder: str | None) -> Tensor | None:
        """The embedding [tokens, dim], or None. encoder None: the latest that any encoder made.

        A file that cannot be read counts as none, with a warning.
        """
        if encoder is None:
            paths = list(self._folder.glob(f"{_digest(prompt)}_*.safetensors"))
        else:
            paths = [path for path in (self._path(prompt, encoder),) if path.is_file()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                return _embedding(path)
            except (ValueError, OSError) as error:
                log.warning("An encoded prompt on disk is left aside: %s", error)
        return None

    def save(self, prompt: str, encoder: str, embedding: Tensor) -> None:
        """Write an embedding; the file appears complete or not at all, with a warning if there is no room for it."""
        path = self._path(prompt, encoder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {EMBEDDING: embedding})
        except OSError as error:
            log.warning("An encoded prompt is not kept in %s: %s.", path.parent, error.strerror or error)


def content_digest(paths: Sequence[Path]) -> str:
    """32 hexadecimal digits of the files' sizes and samples of what they hold; names and dates do not count."""
    state = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        state.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            state.update(file.read(START_BYTES))
            for place in (*range(START_BYTES, size, PIECE_DISTANCE), size - PIECE_BYTES):
                file.seek(max(place, 0))
                state.update(file.read(PIECE_BYTES))
    return state.hexdigest()


def _embedding(path: Path) -> Tensor:
    file = SafetensorsFile(path)
    stored = file.tensors.get(EMBEDDING)
    if stored is None or len(stored.shape) != 2 or 0 in stored.shape:
        raise ValueError(f"{path.name} holds no embedding.")
    embedding = file.read(EMBEDDING)
    if not embedding.is_floating_point() or not bool(torch.isfinite(embedding.float()).all()):
        raise ValueError(f"{path.name} holds no embedding of finite numbers.")
    return embedding


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
