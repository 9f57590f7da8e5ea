"""Names under which Wan transformers are published, and their one canonical form.

Canonical names are those of Wan-Video/Wan2.1, which Kijai's and LightX2V's files use as they are. ComfyUI exports add a
prefix; diffusers' WanTransformer3DModel has names of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
TRUNKS = ("patch_embedding.", "blocks.")

_DIFFUSERS_MARK = re.compile(r"(^|\.)(condition_embedder\.|attn[12]\.|scale_shift_table$|ffn\.net\.)")
_DIFFUSERS_TOP = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out", "head.head"),
)
_DIFFUSERS_BLOCK = (
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("scale_shift_table", "modulation"),
)
_DIFFUSERS_ATTENTION = (
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("norm_added_k", "norm_k_img"),
)
_BLOCK = re.compile(r"^(blocks\.\d+\.)(.+)$")
_ATTENTION = re.compile(r"^((?:self|cross)_attn\.)(.+)$")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a file names its tensors: a prefix in front of every transformer key, and "wan" or "diffusers" names."""

    prefix: str = ""
    style: str = "wan"

    def canonical(self, key: str) -> str:
        """The canonical name of the file's `key`; a key without the prefix is not the transformer's and stays."""
        if not key.startswith(self.prefix):
            return key
        key = key[len(self.prefix) :]
        return from_diffusers(key) if self.style == "diffusers" else key


def naming_of(keys: Iterable[str], *, name: str) -> Naming:
    """The naming of a file with these keys; `name` is used in the error.

    Raises ValueError if the file holds transformer weights under two prefixes, so that either could be meant.
    """
    keys = list(keys)
    found = [p for p in (*PREFIXES, "") if any(k.startswith(tuple(p + t for t in TRUNKS)) for k in keys)]
    if len(found) > 1:
        named = " and ".join(f"'{p}'" if p else "no prefix" for p in found)
        raise ValueError(f"{name} holds transformer weights under {named}; split it into one file per model.")
    prefix = found[0] if found else ""
    style = "diffusers" if any(is_diffusers(k[len(prefix) :]) for k in keys if k.startswith(prefix)) else "wan"
    return Naming(prefix=prefix, style=style)


def is_diffusers(key: str) -> bool:
    """Whether only diffusers' WanTransformer3DModel names a tensor like this."""
    return _DIFFUSERS_MARK.search(key) is not None


def from_diffusers(key: str) -> str:
    """The canonical name of a diffusers name, whatever follows the module (weight, lora_A.weight, ...)."""
    block = _BLOCK.match(key)
    if block is None:
        return _replace_head(key, _DIFFUSERS_TOP)
    rest = _replace_head(block[2], _DIFFUSERS_BLOCK)
    attention = _ATTENTION.match(rest)
    if attention is not None:
        rest = attention[1] + _replace_head(attention[2], _DIFFUSERS_ATTENTION)
    return block[1] + rest


def to_diffusers(key: str) -> str:
    """The diffusers name of a canonical one, whatever follows the module."""
    block = _BLOCK.match(key)
    if block is None:
        return _replace_head(key, _swapped(_DIFFUSERS_TOP))
    rest = block[2]
    attention = _ATTENTION.match(rest)
    if attention is not None:
        rest = attention[1] + _replace_head(attention[2], _swapped(_DIFFUSERS_ATTENTION))
    return block[1] + _replace_head(rest, _swapped(_DIFFUSERS_BLOCK))


def _swapped(table: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return ((new, old) for old, new in table)


def _replace_head(key: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return key
