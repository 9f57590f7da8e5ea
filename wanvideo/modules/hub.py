"""Small files of the Hugging Face hub at a pinned revision: in the local cache, else fetched once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ...kernels import in_a_line

log = logging.getLogger("wanvideo")


def hub_file(repository: str, names: Sequence[str], *, revision: str, note: str) -> Path:
    """The first of the files `names` that is in the cache; else the first one, fetched, with `note` in the log line.

    Raises FileNotFoundError, whose text is the reason, if it cannot be fetched or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for name in names:
        for version in (revision, "main"):
            cached = try_to_load_from_cache(repository, name, revision=version)
            if isinstance(cached, str):
                return Path(cached)
    if _offline():
        raise FileNotFoundError("HF_HUB_OFFLINE is set")
    log.info("Fetching %s of %s (%s).", names[0], repository, note)
    try:
        return Path(hf_hub_download(repository, names[0], revision=revision))
    except (OSError, ValueError) as error:
        log.warning("It could not be fetched: %s", in_a_line(error))
        raise FileNotFoundError("no connection") from error


def _offline() -> bool:
    from huggingface_hub import constants

    # The constant is what the environment was when the library was imported.
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
