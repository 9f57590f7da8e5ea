"""The exchange among GPUs of one host by their copy engines: it takes no multiprocessor from the kernels beside it.

Every rank has boxes that the others write into. A part goes from where it lies to where it belongs in one strided copy,
so that nothing is packed or unpacked. There are as many boxes as a block has exchanges, taken by turns, which is enough
for any number of ranks. Before a rank sends v, q or k of a block, it has waited for every rank's result of the block
before, and each sent that behind its attention, the last to read v, q and k. Before it sends a result, it has waited
for every rank's v, q and k, each made behind all that read the result of the block before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..wanvideo.shard import Arriving
from .exchange import Exchange, Route
from .peer_memory import PeerMemory, PeerMemoryError

log = logging.getLogger("wanvideo")

BOXES = 4
# Every box begins at an address that any kernel takes.
ALIGNMENT = 512
# The largest number that torch copies as it is.
WIDE = torch.complex128
# The first boxes only show that the ranks can reach each other: what a model needs is known in its first block.
FIRST_BYTES = 2**20

# A view of the memory here, which stands for the same place of another rank's, and what goes there.
Piece = tuple[Tensor, Tensor]


class Wire(Protocol):
    """Memory of this rank [bytes] that the others write into, and a way to write into theirs."""

    memory: Tensor

    def send(self, number: int, pieces: Sequence[Sequence[Piece]]) -> Callable[[], None]:
        """Begin to write the pieces of each other rank, and then the number, which must be higher than the last.

        The call that it gives waits until what every rank sent with this number is here, and what went may be freed.
        """

    def close(self) -> None:
        """Give the memory back, when all ranks do."""


class Copies:
    """An `Exchange`. open_wire: with so many bytes on every rank, when all ranks call it."""

    def __init__(self, rank: int, open_wire: Callable[[int], Wire]) -> None:
        self._rank = rank
        self._open_wire = open_wire
        self._unread: set[int] = set()
        self._open(FIRST_BYTES)

    def _open(self, box: int) -> None:
        self._box, self._number = box, 0
        self._wire = self._open_wire(BOXES * box)

    def __call__(self, route: Route) -> Arriving:
        """Begin."""
        dtype = route.sent[0][0].dtype
        # The largest of all ranks, so that all of them take larger boxes at once.
        need = max(map(math.prod, route.shapes)) * dtype.itemsize
        if need > self._box:
            assert not self._unread, "the q, k and v of one attention have one size"
            self._wire.close()
            self._open(-(-need // ALIGNMENT) * ALIGNMENT)
        number = self._number = self._number + 1
        assert number - BOXES not in self._unread, "a result is read before its memory is taken"
        self._unread.add(number)
        box = self._wire.memory.narrow(0, number % BOXES * self._box, self._box)
        results = [_viewed(box, shape, dtype) for shape in route.shapes]
        pieces = [
            list(zip(route.placed(result, target, self._rank), parts, strict=True))
            for target, (result, parts) in enumerate(zip(results, route.sent, strict=True))
        ]
        own, pieces[self._rank] = pieces[self._rank], []
        wait = self._wire.send(number, pieces)

        def arrived() -> Tensor:
            # Copies within a card are kernels: they run where this rank would wait for the others.
            for place, part in own:
                _copy(place, part)
            wait()
            # What went was held for the copy engines, which the allocator does not know of.
            own.clear()
            pieces.clear()
            self._unread.discard(number)
            return results[self._rank]

        return arrived


def _copy(place: Tensor, part: Tensor) -> None:
    """16 bytes as one number, where both sides have such: torch copies strided tensors number by number."""
    if _is_wide(place) and _is_wide(part):
        place, part = place.view(WIDE), part.view(WIDE)
    place.copy_(part)


def _is_wide(t: Tensor) -> bool:
    steps = (t.storage_offset(), t.shape[-1], *t.stride()[:-1])
    return t.stride(-1) == 1 and all(step * t.itemsize % WIDE.itemsize == 0 for step in steps)


def _viewed(box: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return box[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def exchange_of(group: dist.ProcessGroup, device: torch.device) -> Exchange | None:
    """The ranks of a group by their copy engines, when all of them ask; None where that cannot be."""
    if device.type != "cuda":
        return None
    try:
        copies = Copies(dist.get_rank(group), partial(PeerMemory, group, device))
    except PeerMemoryError as error:
        _say(f"GPUs exchange attention heads by NCCL, as they cannot write into each other's memory: {error}")
        return None
    _say("GPUs exchange attention heads by their copy engines; compiled blocks do by NCCL.")
    return copies


@lru_cache
def _say(sentence: str) -> None:
    """Once, though there is a group for every number of ranks that share a pass."""
    log.info(sentence)
