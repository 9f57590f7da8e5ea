"""Devices for block swap on the CPU: copies as late, or as early, as their events allow, and a count of all memory."""

import weakref

import torch
from wanvideo_wrapper.wanvideo.device_copies import OrderedCopies

# Another name for the CPU: a compute device that is not the one where models wait.
DEVICE = torch.device("cpu", 0)


class CountedCopies(OrderedCopies):
    """Runs copies when they are issued, the earliest time. pins: whether there is room to pin. free: bytes left.

    log: what was issued, with the event. slabs: weak references to slabs of the device. pinned: bytes by address.
    """

    def __init__(self, device=DEVICE, *, pins=True, free=0):
        super().__init__(device)
        self.pins, self.left = pins, free
        self.log, self.slabs, self.pinned, self.copied = [], [], {}, 0

    def allocate(self, size):
        slab = super().allocate(size)
        slab.fill_(0xFF)
        self.slabs.append(weakref.ref(slab))
        return slab

    def bytes_on_device(self):
        return sum(slab().nbytes for slab in self.slabs if slab() is not None)

    def event(self):
        return object()

    def record(self, event):
        self.log.append(("record", event))

    def wait(self, event):
        self.log.append(("wait", event))

    def copy(self, pairs, *, after, done):
        assert self.log and ("record", after) in self.log
        self.log.append(("copy", done))
        self.copied += 1
        self.carry_out(list(pairs), done)

    def carry_out(self, pairs, done):
        super().copy(pairs, after=None, done=None)

    def free(self):
        return self.left

    def pin(self, memory):
        if self.pins:
            assert memory.data_ptr() not in self.pinned and memory.data_ptr() % 4096 == 0
            self.pinned[memory.data_ptr()] = memory.nbytes
        return self.pins

    def unpin(self, memory):
        del self.pinned[memory.data_ptr()]

    def misses(self):
        """Waits for copies that were issued by the very visit that waits. Visits end in a record, or "between"."""
        missed, fresh = 0, set()
        for kind, event in self.log:
            fresh = set() if kind in ("between", "record") else fresh | {event} if kind == "copy" else fresh
            missed += kind == "wait" and event in fresh
        return missed


class LateCopies(CountedCopies):
    """Runs copies when the computation waits for them, the latest time."""

    def __init__(self, device=DEVICE, **more):
        super().__init__(device, **more)
        self.queue = []

    def carry_out(self, pairs, done):
        self.queue.append((pairs, done))

    def wait(self, event):
        super().wait(event)
        last = max((i for i, (_, done) in enumerate(self.queue) if done is event), default=-1)
        for pairs, _ in self.queue[: last + 1]:
            OrderedCopies.copy(self, pairs, after=None, done=None)
        del self.queue[: last + 1]

    def drain(self):
        self.queue.clear()
