"""Weights that wait in main memory: all tensors of a block in one stretch, so that one copy brings them.

The parameters point into the slab while they wait, which makes it their only copy in main memory. In a slab on the
device each tensor has the same offset, a multiple of 256 bytes, so that kernels find all of them aligned.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .device_copies import SLAB_ALIGNMENT, Copies, aligned_bytes

log = logging.getLogger("wanvideo")

PAGE = 4096


class HostSlab:
    """Main memory that tensors share. They move into it, each at a multiple of 256 bytes, and their identity stays.

    Pages are not shared with other slabs, so that each can be pinned alone.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += padded_bytes(tensor.nbytes)
        self.memory = aligned_bytes(size, torch.device("cpu"), PAGE)
        self._unpin: weakref.finalize | None = None
        for tensor, start in zip(tensors, starts, strict=True):
            place = view_at(self.memory, start, tensor)
            place.copy_(tensor.detach())
            tensor.data = place

    def offset(self, tensor: Tensor) -> int | None:
        """Where in the slab the tensor's values are, in bytes; None if they are elsewhere."""
        if tensor.untyped_storage().data_ptr() != self.memory.untyped_storage().data_ptr():
            return None
        start = tensor.storage_offset() * tensor.element_size() - self.memory.storage_offset()
        return start if start % SLAB_ALIGNMENT == 0 and tensor.is_contiguous() else None

    @property
    def pinned(self) -> bool:
        """Whether the device reads it by itself."""
        return self._unpin is not None and self._unpin.alive

    def pin(self, copies: Copies) -> None:
        """Pin it until `unpin` or its end, if there is room."""
        if not self.pinned and copies.pin(self.memory):
            # The callback holds the memory: it may not be freed while it is registered.
            self._unpin = weakref.finalize(self, copies.unpin, self.memory)
            self._unpin.atexit = False

    def unpin(self) -> None:
        """No copy may be under way."""
        if self._unpin is not None:
            self._unpin()


class Unit:
    """A module whose weights wait: its parameters and buffers, which are read only as long as they do.

    slabs: the module's own first, then one of tensors that joined it since, such as a LoRA's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slabs: list[HostSlab] = []

    def gather(self, copies: Copies) -> None:
        """Let every tensor wait in a slab, wherever it is now, and pin the slabs."""
        tensors = self.tensors()
        self.slabs = [slab for slab in self.slabs if any(slab.offset(t) is not None for t in tensors)]
        loose = [t for t in tensors if all(slab.offset(t) is None for slab in self.slabs)]
        if loose:
            self.slabs.append(HostSlab(loose))
        for slab in self.slabs:
            slab.pin(copies)

    def release(self, *, keep: int = 0) -> None:
        """Unpin the slabs from number `keep` on. Those of tensors that joined are no longer looked after."""
        for slab in self.slabs[keep:]:
            slab.unpin()
        del self.slabs[1:]

    def tensors(self) -> list[Tensor]:
        """Its parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    @property
    def pinned(self) -> bool:
        """Whether no copy of it needs the host."""
        return all(slab.pinned for slab in self.slabs)

    @property
    def nbytes(self) -> int:
        """Size of its slabs together."""
        return sum(slab.memory.nbytes for slab in self.slabs)

    def copies_into(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs (part of `memory` on the device, slab): the slabs one after the other."""
        parts = memory[: self.nbytes].split([slab.memory.nbytes for slab in self.slabs])
        return [(part, slab.memory) for part, slab in zip(parts, self.slabs, strict=True)]

    def layout(self) -> list[tuple[Tensor, int]]:
        """Its tensors, and where `copies_into` lays each, in bytes."""
        layout, before = [], 0
        tensors = self.tensors()
        for slab in self.slabs:
            offsets = [(tensor, slab.offset(tensor)) for tensor in tensors]
            layout += [(tensor, before + offset) for tensor, offset in offsets if offset is not None]
            before += slab.memory.nbytes
        return layout


def warn_of_pageable(units: Collection[Unit]) -> bool:
    """Whether any of them could not be pinned; the log says how many."""
    pageable = sum(not unit.pinned for unit in units)
    if pageable:
        log.warning(
            "Block swap: the system refuses to pin the memory of %d of %d waiting parts, so that their copies to "
            "the GPU are slower; free main memory, or let fewer blocks wait.",
            pageable,
            len(units),
        )
    return pageable > 0


def padded_bytes(size: int) -> int:
    """What a tensor of that many bytes takes of a slab."""
    return -(-size // SLAB_ALIGNMENT) * SLAB_ALIGNMENT


def view_at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Bytes of `memory` from `start` on as a contiguous tensor of the dtype and shape of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
