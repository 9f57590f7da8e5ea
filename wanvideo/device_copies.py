"""How bytes reach the device, and in which order with the computation there: the seam under block swap.

On CUDA copies run on a stream of their own, ordered against the computation by events, and the host never waits for
them. Elsewhere a copy is done when the call returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

# Offsets in slabs, and where slabs start: what CUDA's own allocator gives, and more than any kernel asks for. Compiled
# graphs never check parameters again, so that all slabs must have one alignment.
SLAB_ALIGNMENT = 256


class Event(Protocol):
    """A point in the order of work on the device."""


class Copies(Protocol):
    """Copies from main memory to one device. Events may be recorded again; a wait is for the latest record.

    measures: whether `free` knows. overlap: whether copies run beside the computation.
    """

    device: torch.device
    measures: bool
    overlap: bool

    def allocate(self, size: int) -> Tensor:
        """A slab on the device: uint8 [size], not initialized, at a multiple of SLAB_ALIGNMENT."""

    def event(self) -> Event:
        """A new event, which counts as past until it is recorded."""

    def record(self, event: Event) -> None:
        """`event` comes after the computation that was issued so far."""

    def wait(self, event: Event) -> None:
        """The computation that is issued from now on comes after `event`."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: Event, done: Event) -> None:
        """Copy (target, source) pairs once `after` is past, beside the computation; then comes `done`."""

    def copy_in_order(self, target: Tensor, source: Tensor) -> None:
        """A small copy from any memory, between the computation issued before it and after it."""

    def drain(self) -> None:
        """Let the host wait until all copies are done."""

    def free(self) -> int:
        """Bytes of the device that nobody uses."""

    def pin(self, memory: Tensor) -> bool:
        """Let the device read this memory by itself, which is fast and needs no host. False where there is no room."""

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""


class CudaCopies:
    """Copies on a stream of their own."""

    measures = True
    overlap = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        """From torch's allocator."""
        return aligned_bytes(size, self.device)

    def event(self) -> torch.cuda.Event:
        """An event without timing."""
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event) -> None:
        """On the stream that computes."""
        event.record(torch.cuda.current_stream(self.device))

    def wait(self, event: torch.cuda.Event) -> None:
        """On the stream that computes; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: torch.cuda.Event, done: torch.cuda.Event) -> None:
        """On the stream of copies. From memory that is not pinned the host waits, too."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done.record(self._stream)

    def copy_in_order(self, target: Tensor, source: Tensor) -> None:
        """By way of pinned memory from torch's cache: from pageable memory the host would wait for the device."""
        target.copy_(source.pin_memory() if source.device.type == "cpu" else source, non_blocking=True)

    def drain(self) -> None:
        """Wait for the stream of copies."""
        self._stream.synchronize()

    def free(self) -> int:
        """What the driver has left and torch may take, and what torch's cache holds without need."""
        left, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        # It does not take a device without a number.
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(index)) - reserved
        return min(left, allowed) + reserved - torch.cuda.memory_allocated(self.device)

    def pin(self, memory: Tensor) -> bool:
        """By registration of exactly this memory: torch's pinned allocator would round up to a power of two."""
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
                return True
            # The refusal stays the last error of the runtime, and the next launch would report it as its own.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device)
        return False

    def unpin(self, memory: Tensor) -> None:
        """Wait for the copies, then take the registration back."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class OrderedCopies:
    """Copies in order with the computation, for devices without streams: the CPU itself, in tests, and others."""

    measures = False
    overlap = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, size: int) -> Tensor:
        """From torch's allocator."""
        return aligned_bytes(size, self.device)

    def event(self) -> None:
        """None is needed."""

    def record(self, event: None) -> None:
        """Everything issued is past, or in order."""

    def wait(self, event: None) -> None:
        """Everything issued is past, or in order."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: None, done: None) -> None:
        """Copy now."""
        for target, source in pairs:
            target.copy_(source)

    def copy_in_order(self, target: Tensor, source: Tensor) -> None:
        """Copy now."""
        target.copy_(source)

    def drain(self) -> None:
        """Nothing is under way."""

    def free(self) -> int:
        """Raises ValueError: such a device does not say."""
        raise ValueError(
            f"The free memory of '{self.device}' cannot be measured, so that blocks_to_swap -1 has nothing to choose "
            "from: give a number of blocks."
        )

    def pin(self, memory: Tensor) -> bool:
        """True: such copies have no use for it."""
        return True

    def unpin(self, memory: Tensor) -> None:
        """Nothing was pinned."""


def copies_for(device: torch.device) -> Copies:
    """The copies of this device."""
    return CudaCopies(device) if device.type == "cuda" else OrderedCopies(device)


def aligned_bytes(size: int, device: torch.device, alignment: int = SLAB_ALIGNMENT) -> Tensor:
    """uint8 [size], not initialized, at a multiple of `alignment`."""
    memory = torch.empty(size + alignment, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % alignment
    return memory[start : start + size]
