"""What links bring, in the one form that the nodes of this pack read.

Packs differ: a single mask comes without its batch, a picture with one channel, a mask with one more dimension, any of
them on the GPU; switches hand on nothing, or what another pack made for a socket of this one. What can be read only one
way is brought into form here, for all nodes at once; the rest is refused by the name of its input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

CHANNELS = (1, 3, 4)
# Sockets at which nodes of this pack never give dicts, as those do that other packs made for the original pack: the
# pack's own, but for LoRAs, which are taken in that form, and collected inputs of the sampler.
OWN_SOCKETS = re.compile(r"WAN(?!VIDLORA|VIDSAMPLEREXTRAARGS)|BLOCKSWAPARGS|VRAM_MANAGEMENTARGS|CACHEARGS")


class _Latent(dict[str, object]):
    """A LATENT that says which input lacks what a node looks up in it. where: that input."""

    def __init__(self, parts: Mapping[str, object], where: str) -> None:
        super().__init__(parts)
        self.where = where

    def __missing__(self, name: str) -> object:
        raise ValueError(
            f"{self.where} has no '{name}' but {', '.join(self) or 'nothing'}: connect latents from WanVideo Encode or "
            "from a sampler."
        )


def in_form(
    declared: Mapping[str, Mapping[str, tuple[object, ...]]], values: Mapping[str, object], node: str
) -> dict[str, object]:
    """The values of a node with IMAGE [n, H, W, C], MASK [n, H, W], LATENT [n, C, F, h, w] and AUDIO [n, C, samples].

    They are on the CPU. node: for messages. Raises ValueError for what has no such form, for settings that another pack
    made for the original one, for links to inputs that the node has not, and for required ones that bring nothing.
    """
    unknown = sorted(set(values).difference(*declared.values()))
    if unknown:
        raise ValueError(
            f"{node} has no input '{unknown[0]}' in this version, but something is linked to it: disconnect it, or put "
            "a new node of this kind in its place."
        )
    kinds = {name: row[0] for section in ("required", "optional") for name, row in declared.get(section, {}).items()}
    required = declared.get("required", {})
    return {
        name: _formed(kinds.get(name), value, f"{node}: '{name}'", needed=name in required)
        for name, value in values.items()
    }


def _formed(kind: object, value: object, where: str, *, needed: bool) -> object:
    if not isinstance(kind, str):
        return value
    own = OWN_SOCKETS.match(kind)
    if value is None:
        # A sound that is missing has sentences of its own.
        if needed and (own or kind in FORMS) and kind != "AUDIO":
            raise ValueError(f"{where} got nothing from the node that is linked to it: a switch or a loader is empty.")
        return value
    value = FORMS[kind](value, where) if kind in FORMS else value
    if own and isinstance(value, dict):
        raise ValueError(
            f"{where} was made by a node of another pack for the original pack, and cannot be used here: connect a "
            f"node of this pack that makes {kind}."
        )
    return value


def _pictures(value: object, where: str) -> Tensor:
    images = _tensor(value, where, "pictures")
    images = images[None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[-1] not in CHANNELS:
        raise ValueError(
            f"{where} is {tuple(images.shape)}, but pictures are [frames, height, width, channels] of 3 or 4 channels: "
            "connect an IMAGE."
        )
    if not images.numel():
        raise ValueError(f"{where} holds no picture: look at the node that loads or cuts them.")
    return (images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images).float()


def _masks(value: object, where: str) -> Tensor:
    masks = _tensor(value, where, "masks")
    if masks.dim() == 2:
        masks = masks[None]
    elif masks.dim() == 4 and 1 in (masks.shape[1], masks.shape[-1]):
        masks = masks.squeeze(1 if masks.shape[1] == 1 else -1)
    if masks.dim() != 3:
        raise ValueError(f"{where} is {tuple(masks.shape)}, but masks are [frames, height, width]: connect a MASK.")
    if not masks.numel():
        raise ValueError(f"{where} holds no mask: look at the node that makes them.")
    return masks.float()


def _latents(value: object, where: str) -> _Latent:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is a {type(value).__name__}, not latents: connect a LATENT.")
    parts = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in value.items()}
    samples = parts.get("samples")
    if samples is None:
        return _Latent(parts, where)
    if not isinstance(samples, Tensor) or samples.dim() != 5:
        given = tuple(samples.shape) if isinstance(samples, Tensor) else f"a {type(samples).__name__}"
        raise ValueError(
            f"{where} is {given}, but latents of a video are [n, channels, frames, height, width]: encode it with "
            "WanVideo Encode; latents of picture models, and those of video with sound, do not fit."
        )
    if not samples.numel():
        raise ValueError(f"{where} is {tuple(samples.shape)}, without any frame: look at the node that cuts them.")
    return _Latent(parts, where)


def _sound(value: object, where: str) -> dict[str, object]:
    waveform = value.get("waveform") if isinstance(value, Mapping) else None
    if not isinstance(waveform, Tensor) or not 1 <= waveform.dim() <= 3:
        raise ValueError(f"{where} is no sound with a waveform [n, channels, samples]: connect an AUDIO.")
    if not waveform.numel():
        raise ValueError(f"{where} has no samples: choose a file that has sound, or trim less of it.")
    try:
        rate = int(value["sample_rate"])
    except (KeyError, TypeError, ValueError):
        rate = 0
    if rate < 1:
        raise ValueError(f"{where} has no sample rate, so that its length is not known: connect an AUDIO.")
    return {**value, "waveform": waveform.cpu()[(None,) * (3 - waveform.dim())]}


def _tensor(value: object, where: str, kind: str) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, not {kind}: connect the node that makes them.")
    return value.cpu()


Form = Callable[[object, str], object]
FORMS: dict[str, Form] = {"IMAGE": _pictures, "MASK": _masks, "LATENT": _latents, "AUDIO": _sound}


def add_form(kind: str, form: Form) -> None:
    """How nodes of this pack take what other packs make for a socket of its own. form: (value, its place) -> value."""
    FORMS[kind] = form
