"""The tokenizer of Qwen2.5 and of its form that sees pictures: beside the model, in the cache, or fetched once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .hub import hub_file

HUB_NAME = "Qwen/Qwen2.5-7B-Instruct"
REVISION = "a09a35458c702b33eeacc393d103063234e8bc28"
NAME = "tokenizer.json"
START, END, END_OF_TEXT, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"


class QwenTokenizer(NamedTuple):
    """encode: text, marks such as <|im_start|> included, to ids; decode: back without marks; id_of: of a mark."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    id_of: Callable[[str], int]


def find_qwen_tokenizer(model: Path, folders: list[Path]) -> QwenTokenizer:
    """That of a folder, or of its subfolder with the hub's name or with the model file's; else of the hub.

    Raises FileNotFoundError, saying what to put where, if it cannot be fetched or HF_HUB_OFFLINE is set.
    """
    places = ("", model.stem, HUB_NAME, HUB_NAME.split("/")[1])
    for path in (folder / place / NAME for folder in folders for place in places):
        # A folder of text encoders may hold the tokenizer of another one under this name.
        if path.is_file() and (tokenizer := _read(path)) is not None:
            return tokenizer
    try:
        path = hub_file(HUB_NAME, (NAME,), revision=REVISION, note="7 MB, once: the tokenizer of all Qwen2.5 models")
    except FileNotFoundError as fault:
        raise FileNotFoundError(
            f"There is no tokenizer for {model.name}, and it could not be fetched ({fault}): put the {NAME} of "
            f"{HUB_NAME} into {folders[0] / model.stem}."
        ) from fault
    tokenizer = _read(path)
    if tokenizer is None:
        raise ValueError(f"{path} is no tokenizer of Qwen2.5: put the {NAME} of {HUB_NAME} there.")
    return tokenizer


def _read(path: Path) -> QwenTokenizer | None:
    """None for the tokenizer of another model."""
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(path))
    # The library raises nothing more special for a file that it cannot read.
    except Exception as error:
        raise ValueError(f"{path} is no tokenizer ({error}): put the {NAME} of {HUB_NAME} there.") from error
    if fast.token_to_id(START) is None or fast.token_to_id(END) is None:
        return None
    return QwenTokenizer(
        encode=lambda text: fast.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: fast.decode(ids, skip_special_tokens=True),
        id_of=fast.token_to_id,
    )
