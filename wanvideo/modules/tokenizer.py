"""The text tokenizer of UMT5: in the checkpoint, beside it, in the local cache, else fetched once.

A GGUF file of a text encoder holds its vocabulary in the header (llama.cpp's fields `tokenizer.ggml.*`).
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from .hub import hub_file

log = logging.getLogger("wanvideo")

EMBEDDED = "spiece_model"
END_OF_TEXT = 1
MAX_TOKENS = 512
HUB_NAME = "google/umt5-xxl"
# Its files have not changed since 2023; another one could not slip in.
REVISION = "66cb9e7e85526fe440a945569e42c72fb6cbc0ad"
NAMES = ("spiece.model", "tokenizer.json")
FILES = (*NAMES, *(f"{HUB_NAME}/{name}" for name in NAMES))
GGUF_FIELDS = "tokenizer.ggml."
GGUF_BYTE = 6
TRIAL = "a person talks to the camera, \u4e2d"
SPACE = "\u2581"

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

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
    """The tokenizer inside the checkpoint, in one of the folders or in the local cache; else it is fetched.

    Raises FileNotFoundError, saying what to put where, if it cannot be fetched or HF_HUB_OFFLINE is set, and ValueError
    for one that is damaged.
    """
    if EMBEDDED in checkpoint.shapes:
        return _built(checkpoint.path, lambda: _sentencepiece(_bytes(checkpoint.tensor(EMBEDDED))))
    if tokens := checkpoint.array(f"{GGUF_FIELDS}tokens"):
        return _built(checkpoint.path, lambda: _from_gguf(checkpoint, tokens))
    beside = next((path for folder in folders for name in FILES if (path := folder / name).is_file()), None)
    try:
        path = beside or hub_file(HUB_NAME, NAMES, revision=REVISION, note="4 MB, once: the text encoder has none")
    except FileNotFoundError as fault:
        raise FileNotFoundError(
            f"There is no tokenizer for {checkpoint.path.name}, and it could not be fetched ({fault}): put the "
            f"{' or '.join(NAMES)} of {HUB_NAME} into {folders[0]}, or use a text encoder file that contains it."
        ) from fault
    return _built(path, lambda: _from_file(path))


def _built(path: Path, build: Callable[[], Encode]) -> Tokenizer:
    """A tokenizer that has been tried. Raises ValueError, naming the file, for one that its library does not take."""
    try:
        tokenizer = Tokenizer(build())
        tokenizer.encode(TRIAL)
    except Exception as error:
        # tokenizers raises Exception itself, sentencepiece RuntimeError.
        fault = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path.name} has a damaged tokenizer ({fault}): fetch the file again, or use another one."
        ) from error
    return tokenizer


def _bytes(stored: Tensor) -> bytes:
    return bytes(stored.to(torch.uint8).flatten().tolist())


def _from_file(path: Path) -> Encode:
    if path.suffix == ".model":
        return _sentencepiece(path.read_bytes())
    from tokenizers import Tokenizer as Fast

    return _fast(Fast.from_file(str(path)))


def _fast(tokenizer: FastTokenizer) -> Encode:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _sentencepiece(model: bytes) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    return lambda text: processor.encode(text)


def _from_gguf(checkpoint: Checkpoint, tokens: list[str]) -> Encode:
    """The unigram model of the header. Raises ValueError for scores of another number, and others of the library."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers

    scores, kinds = (checkpoint.array(GGUF_FIELDS + name) for name in ("scores", "token_type"))
    unknown = checkpoint.metadata.get(f"{GGUF_FIELDS}unknown_token_id", "2")
    if len(scores) != len(tokens) or not unknown.isdigit() or int(unknown) >= len(tokens):
        raise ValueError("the vocabulary in its header is no UMT5's")
    vocabulary = [(token, float(score)) for token, score in zip(tokens, scores, strict=True)]
    fast = Fast(models.Unigram(vocabulary, int(unknown), byte_fallback=GGUF_BYTE in kinds))
    rules = [normalizers.Replace(" ", SPACE)]
    if charsmap := checkpoint.array(f"{GGUF_FIELDS}precompiled_charsmap"):
        rules.insert(0, normalizers.Precompiled(bytes(value & 0xFF for value in charsmap)))
    fast.normalizer = normalizers.Sequence(rules)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    return _fast(fast)
