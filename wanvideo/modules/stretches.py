"""Layers that compute every token alone, run on some tokens at a time: what they need in between is small then.

Shapes: B batch, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.fp8_rows import Fp8Rows

Activation = TypeVar("Activation", Tensor, Fp8Rows)
TILE = 64


def stretches(count: int, parts: int) -> list[slice]:
    """The range of `count` tokens in `parts` pieces, as equal as can be; parts <= count.

    Long ones begin at multiples of 64, so that the rows of a product fill its tiles as if it were one.
    """
    size = -(-count // (parts * TILE)) * TILE
    starts = [i * size if size * (parts - 1) < count else i * count // parts for i in range(parts)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def parts_of(count: int, at_once: int) -> int:
    """In how many pieces `count` tokens run, at most `at_once` each; 0 stands for all in one."""
    return -(-count // at_once) if at_once else 1


def stretched(function: Callable[[slice], Activation], count: int, parts: int) -> Activation:
    """What `function` gives for all of `count` tokens, [B, L, ...], asked for `parts` pieces one after the other."""
    if parts == 1:
        return function(slice(None))
    whole: Activation | None = None
    for tokens in stretches(count, parts):
        piece = function(tokens)
        if whole is None:
            whole = _room(piece, count)
        _write(whole, tokens, piece)
    return whole


def _room(piece: Activation, count: int) -> Activation:
    if isinstance(piece, Fp8Rows):
        return piece._replace(values=_room(piece.values, count), scale=_room(piece.scale, count))
    return torch.empty((piece.shape[0], count, *piece.shape[2:]), dtype=piece.dtype, device=piece.device)


def _write(whole: Activation, tokens: slice, piece: Activation) -> None:
    if isinstance(piece, Fp8Rows):
        whole.values[:, tokens] = piece.values
        whole.scale[:, tokens] = piece.scale
    else:
        whole[:, tokens] = piece
