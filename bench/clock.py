"""How the benchmarks take times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP, ROUNDS, REPEATS = 3, 9, 5
# What keeps the device busy while the host queues the calls: 2 to 3 ms of copies.
AHEAD, AHEAD_BYTES = 16, 2**28

Call = Callable[[], object]


def milliseconds(calls: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Median time of each short call; the calls take turns, so that a change of clocks meets all of them.

    On a GPU the host queues them behind other work, as it does in a model: else they would be timed by its own pace.
    """
    take = _queued(device) if device.type == "cuda" else lambda call: _by_wall(call, REPEATS, device)
    return in_turns(calls, take, warm_up=WARM_UP, rounds=ROUNDS)


def seconds(calls: Mapping[str, Call], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Median time of each call that takes long, the host's share included; in turns, after one that is not counted."""
    taken = in_turns(calls, lambda call: _by_wall(call, 1, device), warm_up=1, rounds=rounds)
    return {name: time / 1000 for name, time in taken.items()}


def in_turns(
    calls: Mapping[str, Call], take: Callable[[Call], float], *, warm_up: int, rounds: int
) -> dict[str, float]:
    """Median of what `take` says of each call."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(take(call))
    return {name: statistics.median(measured) for name, measured in times.items()}


def _queued(device: torch.device) -> Callable[[Call], float]:
    source = torch.zeros(AHEAD_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def take(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(AHEAD):
            target.copy_(source)
        start.record()
        for _ in range(REPEATS):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / REPEATS

    return take


def _by_wall(call: Call, repeats: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return (time.perf_counter() - start) * 1000 / repeats


def wait_for(device: torch.device) -> None:
    """Until all that was queued on it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_above(call: Call, device: torch.device) -> float:
    """GiB of a GPU's memory that the call takes at most, above what is taken before."""
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait_for(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30
