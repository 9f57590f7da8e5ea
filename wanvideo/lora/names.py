"""Keys of LoRA files: which layer of a model, and which part of its change.

A key is prefix + layer + part. Trainers and converters name layers as the model does, as diffusers does, or either with
underscores for dots, which cannot be undone without the model's own names; so a table of all spellings of the model's
layers is looked up instead of taking keys apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..key_names import to_diffusers

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "diffusion.model.", "transformer.", "pipe.dit.",
    "unet.", "model.", "module.", "dit.",
)  # fmt: skip
# kohya and musubi write one underscore or two; LyCORIS has a prefix of its own.
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lycoris_", "lora_transformer_")
TEXT_ENCODER = re.compile(r"^(lora_te\d?_|lora_prior_te_|text_encoders?(_\d)?\.|te\d?\.)")

_PAIR_SPELLINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down", ".lora_up"),
)
# Stand-In's pairs (WeChatCV/Stand-In), a group beside other pairs of the same layer.
OWN_PAIR_MARK = "_loras"
OWN_PAIR = (f"{OWN_PAIR_MARK}.down.weight", f"{OWN_PAIR_MARK}.up.weight")
_OWN_NAMES = (
    "alpha", "dora_scale", "diff", "diff_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "lokr_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
)  # fmt: skip
_SUFFIXES = {
    **{down: "down" for down, _ in (*_PAIR_SPELLINGS, OWN_PAIR)},
    **{up: "up" for _, up in (*_PAIR_SPELLINGS, OWN_PAIR)},
    **{f".{name}": name for name in _OWN_NAMES},
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".lora_mid.weight": "mid",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".diff_m": "diff",
}
_LONGEST_FIRST = sorted(_SUFFIXES, key=len, reverse=True)
# PEFT puts the adapter's name ("default") between the part and what follows it.
_ADAPTER = re.compile(
    r"(\.(?:lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!(?:weight|bias)$)[^.]+(?=\.(?:weight|bias)$|$)"
)


class Key(NamedTuple):
    """group: what the parts of one change have in common, as the file spells it; layer: the layer in it."""

    group: str
    layer: str
    part: str


def split_key(key: str) -> Key | None:
    """A key of a LoRA file, taken apart; None where it ends in no part of a change."""
    key = _ADAPTER.sub(r"\1", key.replace("._orig_mod.", ".").removeprefix("_orig_mod.")).replace(".default.", ".")
    suffix = next((suffix for suffix in _LONGEST_FIRST if key.endswith(suffix)), None)
    if suffix is None or key == suffix:
        return None
    group = layer = key.removesuffix(suffix)
    if suffix in OWN_PAIR:
        group += OWN_PAIR_MARK
    elif suffix == ".diff_m":
        group = layer = f"{layer}.modulation"
    return Key(group, layer, _SUFFIXES[suffix])


class LayerNames:
    """Every spelling of a model's layers that LoRA files use."""

    def __init__(self, names: Iterable[str]) -> None:
        self._spellings: dict[str, str] = {}
        self._flat: dict[str, str] = {}
        for name in names:
            for spelling in (to_diffusers(name), name):
                self._spellings[spelling] = name
                self._flat[spelling.replace(".", "_")] = name

    def find(self, layer: str) -> str | None:
        """The model's name of a file's layer; None where the model has none such."""
        flat = next((prefix for prefix in FLAT_PREFIXES if layer.startswith(prefix)), None)
        if flat is not None:
            return _look_up(layer.removeprefix(flat), self._flat, [p.replace(".", "_") for p in PREFIXES])
        return _look_up(layer, self._spellings, PREFIXES)


def bare(layer: str) -> str:
    """A file's layer without the prefixes, for messages and claims."""
    for prefix in FLAT_PREFIXES:
        layer = layer.removeprefix(prefix)
    while (prefix := next((p for p in PREFIXES if layer.startswith(p)), None)) is not None:
        layer = layer.removeprefix(prefix)
    return layer


def _look_up(layer: str, table: dict[str, str], prefixes: Iterable[str]) -> str | None:
    while layer not in table:
        prefix = next((p for p in prefixes if layer.startswith(p)), None)
        if prefix is None:
            return None
        layer = layer.removeprefix(prefix)
    return table[layer]
