"""Fingerprints of a run's inputs, so that an interrupted run is only continued under the same inputs.

Files count by name, size and time of change: hashing 30 GB of weights would take longer than a window.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

Plain = (str, int, float, bool, type(None), torch.dtype, torch.device)


class Hash(Protocol):
    """What hashlib gives."""

    def update(self, data: bytes) -> None:
        """More input."""

    def hexdigest(self) -> str:
        """The result so far."""


def digest(value: object) -> str:
    """32 hexadecimal digits of numbers, strings, tensors, modules, files (a Path), and dataclasses and containers of
    these. Fields of a dataclass that are left out of its comparison do not count.

    Raises TypeError for anything else, rather than leaving it out.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Hash, value: object) -> None:
    if isinstance(value, Plain):
        state.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, Tensor):
        state.update(f"tensor:{value.dtype}:{tuple(value.shape)};".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Path):
        found = value.stat()
        state.update(f"file:{value.name}:{found.st_size}:{found.st_mtime_ns};".encode())
    elif isinstance(value, nn.Module):
        _feed(state, dict(value.state_dict()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        state.update(f"{type(value).__qualname__};".encode())
        _feed(state, {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare})
    elif isinstance(value, Mapping):
        state.update(f"mapping:{len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, Sequence):
        state.update(f"sequence:{len(value)};".encode())
        for part in value:
            _feed(state, part)
    else:
        raise TypeError(f"A run with a {type(value).__name__} among its inputs cannot be told from others.")
