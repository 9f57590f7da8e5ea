"""The text tokenizer of UMT5: sentencepiece or tokenizers, from the checkpoint, the model folder or the local cache."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path

from ...quiet_imports import kernels_hidden
from ..checkpoint import Checkpoint

log = logging.getLogger("wanvideo")

EMBEDDED = "spiece_model"
END_OF_TEXT = 1
MAX_TOKENS = 512
FILES = ("spiece.model", "tokenizer.json", "google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json")
HUB_NAME = "google/umt5-xxl"

Encode = Callable[[str], list[int]]


def clean(text: str) -> str:
    """Prompt text as Wan was trained on: repaired encoding, HTML entities resolved, white space collapsed."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Text to token ids, the end token included, at most 512."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    def encode(self, text: str) -> list[int]:
        """Ids of the cleaned text; what does not fit is cut off, with a warning."""
        ids = self._encode(clean(text))
        if len(ids) > MAX_TOKENS - 1:
            log.warning("The prompt has %d tokens; only the first %d are used.", len(ids), MAX_TOKENS - 1)
        return [*ids[: MAX_TOKENS - 1], END_OF_TEXT]


def find_tokenizer(checkpoint: Checkpoint, folders: list[Path]) -> Tokenizer:
    """The tokenizer inside the checkpoint, else in one of the folders, else in the local transformers cache.

    Raises FileNotFoundError, saying what to put where. Nothing is downloaded.
    """
    if EMBEDDED in checkpoint.shapes:
        return Tokenizer(_sentencepiece(bytes(checkpoint.tensor(EMBEDDED).tolist())))
    for folder in folders:
        for path in (folder / name for name in FILES):
            if path.is_file():
                return Tokenizer(_from_file(path))
    cached = _from_cache()
    if cached is None:
        raise FileNotFoundError(
            f"There is no tokenizer for {checkpoint.path.name}: put the spiece.model or tokenizer.json of {HUB_NAME} "
            f"into {folders[0]}, or use a text encoder file that contains it."
        )
    return Tokenizer(cached)


def _from_file(path: Path) -> Encode:
    if path.suffix == ".model":
        return _sentencepiece(path.read_bytes())
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(path))
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def _sentencepiece(model: bytes) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    return lambda text: processor.encode(text)


def _from_cache() -> Encode | None:
    with kernels_hidden("transformers"):
        from transformers import AutoTokenizer

        try:
            cached = AutoTokenizer.from_pretrained(HUB_NAME, local_files_only=True)
        except (OSError, ValueError):
            return None
    return lambda text: cached.encode(text, add_special_tokens=False)
