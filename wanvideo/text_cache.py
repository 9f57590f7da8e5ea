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
        name = hashlib.sha256(f"{encoder}\n{prompt}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"

    def load(self, prompt: str, encoder: str) -> Tensor | None:
        """The kept embedding [tokens, dim], or None."""
        from safetensors.torch import load_file

        path = self._path(prompt, encoder)
        return load_file(path)["embedding"].clone() if path.is_file() else None

    def save(self, prompt: str, encoder: str, embedding: Tensor) -> None:
        """Keep an embedding; the file appears complete or not at all."""
        from safetensors.torch import save_file

        path = self._path(prompt, encoder)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({"embedding": embedding.contiguous()}, partial)
        partial.replace(path)
