"""Copies between main memory and a GPU through two pieces of pinned memory, one filled while the other is read.

From pageable memory and to it the driver copies with one thread and waits; this takes about a quarter of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("wanvideo")

# Pinned memory that a copy goes through. Smaller tensors gain nothing by it.
PIECE = 64 * 2**20
WORTH_STAGING = 2**20
MAIN_MEMORY = torch.device("cpu")


class Piece(NamedTuple):
    """Pinned bytes, and when the last copy to them or from them has ended."""

    memory: Tensor
    copied: torch.cuda.Event


class Staging:
    """Copies to a device and from it, for as long as it is entered; tensors: some of what will be copied."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._device = device
        self._pieces: list[Piece] = []
        self._staged = device.type == "cuda" and any(map(_is_staged, tensors))

    def __enter__(self) -> Staging:
        if self._staged:
            try:
                pinned = torch.empty(2, PIECE, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                log.info("The system refuses to pin memory, so that weights go to the GPU more slowly.")
            else:
                self._pieces = [Piece(piece, torch.cuda.Event()) for piece in pinned]
        return self

    def __exit__(self, *failure: object) -> None:
        # Whoever gets this memory next may write to it at once.
        for piece in self._pieces:
            piece.copied.synchronize()

    def copy(self, source: Tensor) -> Tensor:
        """The same values on the device."""
        if not self._pieces or not _is_staged(source):
            return source.to(self._device)
        target = torch.empty_like(source, device=self._device)
        for there, here in self.staged([(target, source)]):
            there.copy_(here, non_blocking=True)
        return target

    def staged(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Copies to the device, (target, source), as copies from pinned memory.

        Each is to be issued on the current stream, without waiting, before the next is asked for.
        """
        for target, source in pairs:
            if not self._pieces or not _is_staged(source):
                yield target, source
                continue
            for there, here in _parts(target, source):
                piece = self._next()
                yield there, piece.memory[: here.numel()].copy_(here)
                piece.copied.record(torch.cuda.current_stream(self._device))

    def fetch(self, source: Tensor) -> Tensor:
        """The same values in main memory."""
        if not self._pieces or source.nbytes < WORTH_STAGING or not source.is_contiguous():
            return source.to(MAIN_MEMORY)
        target = torch.empty_like(source, device=MAIN_MEMORY)
        arriving: list[tuple[Tensor, Piece]] = []
        for there, here in _parts(target, source):
            piece = self._next()
            piece.memory[: here.numel()].copy_(here, non_blocking=True)
            piece.copied.record(torch.cuda.current_stream(self._device))
            arriving.append((there, piece))
            # One is emptied while the next arrives.
            if len(arriving) > 1:
                _empty(*arriving.pop(0))
        _empty(*arriving.pop())
        return target

    def _next(self) -> Piece:
        """The piece that was used before the last one, free again."""
        self._pieces.reverse()
        self._pieces[0].copied.synchronize()
        return self._pieces[0]


def _empty(target: Tensor, piece: Piece) -> None:
    piece.copied.synchronize()
    target.copy_(piece.memory[: target.numel()])


def _parts(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes of both, a piece at a time."""
    return zip(_octets(target).split(PIECE), _octets(source).split(PIECE), strict=True)


def _is_staged(tensor: Tensor) -> bool:
    return (
        tensor.device == MAIN_MEMORY
        and tensor.nbytes >= WORTH_STAGING
        and tensor.is_contiguous()
        and not tensor.is_pinned()
    )


def _octets(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
