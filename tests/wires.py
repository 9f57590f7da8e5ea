"""Ranks as threads of one process, whose copy engines are threads too: slow, and never in step."""

import queue
import random
import threading
import time
from functools import partial

import numpy as np
import torch
from limits import PATIENCE
from wanvideo_wrapper.distributed.copies import Copies
from wanvideo_wrapper.distributed.peer_memory import boxes


def box_copied(memory, at, place, part):
    """What a copy engine makes of boxes: bytes of a row, rows of a slice, slices."""
    source = torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage()).numpy()
    start = part.storage_offset() * part.itemsize
    for box in boxes(tuple(place.shape), place.stride(), part.stride(), part.itemsize):
        shape = (box.depth, box.height, box.width)

        def rows(data, offset, pitch, count, shape=shape):
            return np.lib.stride_tricks.as_strided(data[offset:], shape, (pitch * count, pitch, 1))

        rows(memory, at + box.to, box.to_pitch, box.to_rows)[:] = rows(
            source, start + box.of, box.of_pitch, box.of_rows
        )


class Team:
    """So many ranks; `run` gives each a thread and a `Copies`, and returns what each made."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.arrived = threading.Condition()
        self.barrier = threading.Barrier(ranks, timeout=PATIENCE)
        self.wires = [None] * ranks
        self.opened, self.closed = [], []

    def run(self, work):
        made = [None] * self.ranks

        def begin(rank):
            made[rank] = work(rank, Copies(rank, partial(_Wire, self, rank)))

        threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "a rank waits for a number that does not come"
        return made


class _Wire:
    """A `Wire` whose numbers stand in a list."""

    def __init__(self, team, rank, size):
        self.team, self.rank = team, rank
        self.memory = torch.full((size,), 255, dtype=torch.uint8)
        self.bytes = self.memory.numpy()
        self.numbers = [0] * team.ranks
        self.jobs = queue.SimpleQueue()
        team.barrier.wait()
        team.wires[rank] = self
        team.opened.append(size)
        team.barrier.wait()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while (job := self.jobs.get()) is not None:
            job()

    def send(self, number, pieces):
        done = threading.Event()

        def job():
            for target, parts in enumerate(pieces):
                other = self.team.wires[target]
                for place, part in parts:
                    time.sleep(random.random() * 4e-4)
                    box_copied(other.bytes, place.data_ptr() - self.memory.data_ptr(), place, part)
                with self.team.arrived:
                    assert other.numbers[self.rank] < number
                    other.numbers[self.rank] = number
                    self.team.arrived.notify_all()
            done.set()

        self.jobs.put(job)

        def wait():
            with self.team.arrived:
                assert self.team.arrived.wait_for(lambda: min(self.numbers) >= number, PATIENCE)
            assert done.wait(PATIENCE)

        return wait

    def close(self):
        self.jobs.put(None)
        self.team.closed.append(self.rank)
        self.team.barrier.wait()
