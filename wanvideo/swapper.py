"""Brings waiting blocks to the device around their turn, through a few slabs there that all of them share.

While a block runs in one slab, the next one is copied into another. Which comes next is learned from the visits so
far: a forward repeats the one before it, and so the first block of a step is copied during the last of the step before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .device_copies import Copies
from .host_slabs import Unit, view_at

log = logging.getLogger("wanvideo")

# In passes over all waiting blocks. A step may have three passes (two guidances) that skip different blocks; what comes
# next is then known from a pass that was preceded by the same ones.
REMEMBERED, COMPARED = 6, 2


class Waiting(NamedTuple):
    """A tensor, where its values are in a slot, and the address where they wait."""

    tensor: Tensor
    start: int
    address: int


class Slot:
    """A slab on the device. holder: which unit's weights it has, or will have once `ready` is past."""

    def __init__(self, copies: Copies, size: int) -> None:
        self.memory = copies.allocate(size)
        self.ready, self.released = copies.event(), copies.event()
        # Its memory may be that of tensors which the computation issued so far still reads.
        copies.record(self.released)
        self.holder: int | None = None
        self.running = False
        self.used = 0
        self.views: dict[int, list[Tensor]] = {}


class Swapper:
    """Waiting units on their way through the slots. It has `ahead` + 1 of them, each as large as the largest unit.

    Use `visit` around each run of a unit's module, and `close` in the end, after errors too. Between visits the
    tensors' values may be replaced (`tensor.data = ...`), which the next visit sees; never written in place.
    """

    def __init__(self, units: Sequence[Unit], copies: Copies, *, ahead: int = 1, debug: bool = False) -> None:
        self._units = units
        self._copies = copies
        self._ahead = max(ahead, 1)
        self._debug = debug
        self._places = {id(unit.module): place for place, unit in enumerate(units)}
        self._tensors = [[Waiting(tensor, start, tensor.data_ptr()) for tensor, start in u.layout()] for u in units]
        size = max(unit.nbytes for unit in units)
        self._slots = [Slot(copies, size) for _ in range(min(self._ahead + 1, len(units)))]
        self._clock = 0
        # Until visits tell another, the order is that of the units.
        self._visits = [*range(len(units))] * 2
        self._bring_upcoming(only_pinned=True)

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module's weights are on the device. Modules that do not wait are there in any case."""
        place = self._places.get(id(module))
        if place is None or any(slot.running and slot.holder == place for slot in self._slots):
            yield
            return
        slot = self._arrive(place)
        values = [entry.tensor.data for entry in self._tensors[place]]
        try:
            replaced = self._point(place, slot)
            # From pageable memory the host waits for the copy: that must not keep this unit's work from being issued.
            self._bring_upcoming(only_pinned=True)
            yield
        finally:
            for entry, value in zip(self._tensors[place], values, strict=True):
                entry.tensor.data = value
            self._copies.record(slot.released)
            slot.running = False
        if replaced:
            slot.holder = None
        self._bring_upcoming(only_pinned=False)

    def close(self) -> None:
        """Give the slots back. The host waits for the copies, which read the units' slabs."""
        self._copies.drain()
        self._slots.clear()

    def _arrive(self, place: int) -> Slot:
        """The slot that has the unit, or will have it before what is issued from now on runs."""
        slot = next((slot for slot in self._slots if slot.holder == place), None)
        if slot is None:
            slot = self._bring(place, [])
        if slot is None:
            raise RuntimeError(f"More than {len(self._slots)} waiting blocks were asked for at once.")
        self._copies.wait(slot.ready)
        slot.running = True
        self._touch(slot)
        self._visits.append(place)
        del self._visits[: -REMEMBERED * len(self._units)]
        return slot

    def _point(self, place: int, slot: Slot) -> bool:
        """Point the unit's tensors into the slot. Whether a value there is not the slab's, but what replaced it."""
        entries, replaced = self._tensors[place], False
        if place not in slot.views:
            slot.views[place] = [view_at(slot.memory, entry.start, entry.tensor) for entry in entries]
        for entry, view in zip(entries, slot.views[place], strict=True):
            if entry.tensor.data_ptr() != entry.address:
                self._copies.copy_in_order(view, entry.tensor.data)
                replaced = True
            entry.tensor.data = view
        return replaced

    def _bring_upcoming(self, *, only_pinned: bool) -> None:
        upcoming = self._upcoming()
        for place in upcoming:
            here = any(slot.holder == place for slot in self._slots)
            if not here and (self._units[place].pinned or not only_pinned):
                self._bring(place, upcoming)

    def _bring(self, place: int, upcoming: Sequence[int]) -> Slot | None:
        """Copy the unit into the slot that was used least lately; None if all are running or wanted soon."""
        free = [slot for slot in self._slots if not slot.running and slot.holder not in upcoming]
        if not free:
            return None
        slot, unit = min(free, key=lambda slot: slot.used), self._units[place]
        slot.holder = None
        self._copies.copy(unit.copies_into(slot.memory), after=slot.released, done=slot.ready)
        slot.holder = place
        self._touch(slot)
        if self._debug:
            log.info("Waiting block %d: %.1f MB to the GPU.", place, unit.nbytes / 2**20)
        return slot

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock

    def _upcoming(self) -> list[int]:
        """The next units: those that followed where the latest visits came in the same order, as far back as known."""
        visits, best, longest = self._visits, len(self._visits), 0
        most = COMPARED * len(self._units)
        for end in range(len(visits) - 1, 0, -1):
            same = 0
            while same < min(end, most) and visits[end - 1 - same] == visits[-1 - same]:
                same += 1
            if same > longest:
                best, longest = end, same
            if longest == most:
                break
        return visits[best : best + self._ahead]
