"""Encoded prompts on disk, so that the text encoder need not be loaded again for a prompt it has seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor


class TextCache:
    """safetensors files in a folder, one a prompt and encoder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, prompt: str, encoder: str) -> Path:
        return self._folder / f"{_digest(prompt)}_{_digest(encoder)}.safetensors"

    def load(self, prompt: str, encoder: str | None) -> Tensor | None:
        """The kept embedding [tokens, dim], or None. encoder None: the latest that any encoder made."""
        from safetensors.torch import load_file

        if encoder is None:
            kept = list(self._folder.glob(f"{_digest(prompt)}_*.safetensors"))
        else:
            kept = [path for path in (self._path(prompt, encoder),) if path.is_file()]
        latest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        return None if latest is None else load_file(latest)["embedding"].clone()

    def save(self, prompt: str, encoder: str, embedding: Tensor) -> None:
        """Keep an embedding; the file appears complete or not at all."""
        from safetensors.torch import save_file

        path = self._path(prompt, encoder)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({"embedding": embedding.contiguous()}, partial)
        partial.replace(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
