"""The factor of a pair: alpha / rank, where a file says its alpha.

A layer's own `alpha` comes first. PEFT keeps it in a configuration instead: diffusers writes that into the header
(`lora_adapter_metadata`), PEFT itself into adapter_config.json beside the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .names import PREFIXES, bare

log = logging.getLogger("wanvideo")

HEADER_FIELD = "lora_adapter_metadata"
NEIGHBOUR = "adapter_config.json"
PEFT_FILE = "adapter_model"
PEFT_PREFIX = "base_model.model."
LARGEST_CONFIG = 1 << 20
_MODELS = {"", *PREFIXES}
_LITERAL = re.compile(r"[\w.\-]+")


class Scaling:
    """Factors of one file's layers. source: where alpha comes from when a layer has none, for the log."""

    def __init__(self, config: Mapping[str, object] | None, source: str = "", *, stabilized: bool = False) -> None:
        self.source = source
        self._alpha = None if config is None else _number(config.get("lora_alpha", config.get("alpha")))
        self._patterns: dict[str, float] = {}
        patterns = {} if config is None else config.get("alpha_pattern")
        for pattern, alpha in patterns.items() if isinstance(patterns, Mapping) else ():
            if _LITERAL.fullmatch(pattern) is None or _number(alpha) is None:
                log.warning("%s: the alpha_pattern '%s': %s is no name and number, and is left out.", source, pattern,
                            alpha)  # fmt: skip
                continue
            self._patterns[pattern] = float(alpha)
        self._by_root = bool(config is not None and config.get("use_rslora"))
        self._stabilized = stabilized and config is None

    def factor(self, layer: str, alpha: float | None, rank: int, pair: bool) -> float:
        """Of a layer as the file spells it. alpha: its own, None or 0 where there is none; pair: or LoHa, LoKr."""
        if alpha:
            return alpha / rank
        name = bare(layer)
        stated = next((a for p, a in self._patterns.items() if name == p or name.endswith(f".{p}")), self._alpha)
        if stated is not None:
            return stated / math.sqrt(rank) if self._by_root else stated / rank
        # Without a configuration the pairs of PEFT's own files are taken for rank-stabilized ones with alpha = rank,
        # in the whole numbers that the original pack has given its users: 2.75 at rank 8.
        return (rank * rank // rank**0.5) / rank if self._stabilized and pair else 1.0


def scaling_of(path: Path, metadata: Mapping[str, str], keys: Iterable[str], ranks: frozenset[int]) -> Scaling:
    """Where this file's factors come from. ranks: of its pairs, which tell whether a neighbour belongs to it.

    Raises ValueError for a configuration that is no JSON object.
    """
    peft = any(key.startswith(PEFT_PREFIX) for key in keys)
    if HEADER_FIELD in metadata:
        config = _own_model(_json(metadata[HEADER_FIELD], f"{path.name}: '{HEADER_FIELD}' of the header"))
        return Scaling(config, f"{HEADER_FIELD} of {path.name}")
    neighbour = path.with_name(NEIGHBOUR)
    if neighbour.is_file() and _belongs(path, peft):
        if neighbour.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"{neighbour} is too large to be the configuration of an adapter; move it elsewhere.")
        config = _json(neighbour.read_text(encoding="utf-8", errors="replace"), str(neighbour))
        patterns = config.get("rank_pattern")
        stated = {config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())}
        if any(rank in stated for rank in ranks):
            return Scaling(config, NEIGHBOUR)
    return Scaling(None, stabilized=peft)


def _belongs(path: Path, peft: bool) -> bool:
    """A folder of many LoRAs may hold one stray configuration, which says nothing of most of them."""
    return peft or path.stem.startswith(PEFT_FILE) or len(list(path.parent.glob("*.safetensors"))) == 1


def _own_model(config: Mapping[str, object]) -> Mapping[str, object]:
    """diffusers writes one configuration for each model of a pipeline, as "transformer.lora_alpha"."""
    own: dict[str, object] = {}
    for key, value in config.items():
        model, _, field = key.rpartition(".")
        if (f"{model}." if model else "") in _MODELS:
            own[field] = value
    return own


def _json(text: object, what: str) -> Mapping[str, object]:
    try:
        config = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error}), so that alpha is unknown: download the LoRA again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{what} is no JSON object, so that alpha is unknown: download the LoRA again.")
    return config


def _number(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
