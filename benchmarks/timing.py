"""How the benchmarks take times."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP, ROUNDS, REPEATS = 3, 9, 5


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each call; the calls take turns, so that a change of clocks meets all of them."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPEATS):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / REPEATS)
    return {name: statistics.median(found) for name, found in times.items()}
