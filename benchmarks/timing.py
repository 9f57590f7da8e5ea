"""How the benchmarks take times."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP, ROUNDS, REPEATS = 3, 9, 5
# What keeps the device busy while the host queues the calls: 2 to 3 ms of copies.
AHEAD, AHEAD_BYTES = 16, 2**28


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each call on the device; the calls take turns, so that a change of clocks meets all of them.

    The host queues them behind other work, as it does in a model: else short calls would be timed by its own pace.
    """
    source = torch.zeros(AHEAD_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(AHEAD):
                target.copy_(source)
            start.record()
            for _ in range(REPEATS):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / REPEATS)
    return {name: statistics.median(found) for name, found in times.items()}
