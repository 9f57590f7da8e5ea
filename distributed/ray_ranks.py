"""The ranks of one video as Ray's actors, on the hosts of a cluster that have free GPUs.

Ray places and starts them, and carries what the first one shows. What a step sends goes by torch.distributed, as on one
host; ranks meet by a TCP store on the first one's host. Every host needs this package, and models, inputs and results
under the same paths.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType

import torch
import torch.distributed as dist

from ..host import Progress
from .rank import Outcome, Rank, Work, join, outcome
from .ray_cluster import connected, room, why
from .told import Shown, Terminal
from .watch import LAST_WORDS_SECONDS, LOOK_SECONDS, START_SECONDS, death, watch

# How long all ranks wait for a place on one host before they take places on several.
ONE_HOST_SECONDS = 2.0
STARTED = "started"


def launch_on_ray(
    work: Work,
    *,
    address: str,
    count: int,
    device: str,
    progress: Callable[[int, str], Progress],
    start_seconds: float = START_SECONDS,
) -> Sequence[str]:
    """As `launch`, on a cluster. device: "cuda" or "cpu", "auto" is the former. progress: makes the bars shown here.

    Raises besides ValueError where the cluster is too small, and ConnectionError where there is none.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"Ray chooses the GPUs of its cluster: give --device cuda or cpu, not {device}.")
    kind = "CPU" if device == "cpu" else "GPU"
    with connected(address) as ray, ExitStack() as stack:
        room(ray, address, kind=kind, wanted=count)
        places = _places(ray, kind, count, start_seconds)
        team = _Actors(ray, work, places, Terminal(progress, stack))
        stack.callback(team.end)
        watch(team, start_seconds)
        return team.outcomes[0].shown


def _places(ray: ModuleType, kind: str, count: int, seconds: float) -> Sequence[tuple[str, dict[str, object]]]:
    """The host of each rank, and the options of its actor: all on one host where one has room, else on several.

    Ranks of a host follow each other, so that those that share a pass's tokens are near.
    """
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    need = {"CPU": 1, kind: 1}
    together = any(node["Resources"].get(kind, 0) >= count for node in ray.nodes() if node["Alive"])
    tries = [("STRICT_PACK", min(ONE_HOST_SECONDS, seconds))] if together else []
    for strategy, patience in (*tries, ("PACK", seconds)):
        group = placement_group([need] * count, strategy=strategy)
        if group.wait(patience):
            break
        remove_placement_group(group)
    else:
        raise RuntimeError(
            f"The Ray cluster has had no {count} {kind} free within {seconds:.0f} seconds (ray status says who has "
            "them): wait until others end, or use fewer GPUs."
        )
    bundles = placement_group_table(group)["bundles_to_node_id"]
    # Asked for now: hosts may have joined meanwhile.
    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [
        (
            hosts[node],
            {
                "num_cpus": 1,
                "num_gpus": need.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            },
        )
        for bundle, node in sorted(bundles.items(), key=lambda item: (item[1], item[0]))
    ]


class _Actors:
    """A team of them."""

    remedy = (
        "see with nvidia-smi whether another process holds its GPU, and whether the hosts reach each other on all "
        "ports, or use fewer GPUs."
    )

    def __init__(
        self, ray: ModuleType, work: Work, places: Sequence[tuple[str, dict[str, object]]], terminal: Terminal
    ) -> None:
        self.count = len(places)
        self.outcomes: dict[int, Outcome] = {}
        self._ray = ray
        self._terminal = terminal
        self._hosts = [host for host, _ in places]
        self._late = set(range(self.count))
        self._lost: list[str] = []
        # A second call is heard while `run` is at work.
        kind = ray.remote(max_concurrency=2)(_Actor)
        self._actors = [kind.options(**options).remote() for _, options in places]
        meeting = self._actors[0].open.remote(self.count)
        self._running: dict[object, int] = {}
        for rank, (actor, (_, options)) in enumerate(zip(self._actors, places, strict=True)):
            device = "cuda:0" if options["num_gpus"] else "cpu"
            stream = actor.run.options(num_returns="streaming").remote(rank, self.count, device, meeting, work)
            self._running[stream] = rank

    def end(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def wait(self, seconds: float) -> bool:
        ready, _ = self._ray.wait(list(self._running), timeout=seconds) if self._running else ([], [])
        for stream in ready:
            self._take(stream)
        return bool(self._running)

    def late(self) -> Sequence[int]:
        return sorted(self._late)

    def failure(self) -> Exception | None:
        errors = [error for result in self.outcomes.values() if (error := result.error())]
        if not errors and not self._lost:
            return None
        # Where a rank died, others have lost their connections, which is not the reason.
        end = time.monotonic() + LAST_WORDS_SECONDS
        while not self._lost and self.wait(LOOK_SECONDS) and time.monotonic() < end:
            pass
        return RuntimeError(self._lost[0]) if self._lost else errors[0]

    def stop(self) -> None:
        self._actors[0].stop.remote()

    def _take(self, stream: object) -> None:
        rank = self._running[stream]
        try:
            said = self._ray.get(next(stream))
        except self._ray.exceptions.RayError as error:
            del self._running[stream]
            self._lost.append(death(rank, self.count, f"on {self._hosts[rank]}: {why(error)}"))
            return
        if isinstance(said, Outcome):
            del self._running[stream]
            self.outcomes[rank] = said
        elif said == STARTED:
            self._late.discard(rank)
        else:
            self._terminal.take(said)


class _Actor:
    """A rank's process."""

    def __init__(self) -> None:
        self._cancel = threading.Event()
        self._store: dist.Store | None = None

    def open(self, count: int) -> tuple[str, int]:
        """The first rank's: where all meet, at a port that is free."""
        from ray.util import get_node_ip_address

        address = get_node_ip_address()
        self._store = dist.TCPStore(address, 0, count, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def stop(self) -> None:
        """At the next step."""
        self._cancel.set()

    def run(self, rank: int, count: int, device: str, meeting: tuple[str, int], work: Work) -> Iterator[object]:
        """What is told, and the outcome."""
        told: queue.SimpleQueue[object] = queue.SimpleQueue()

        def tell(said: object) -> None:
            # A terminal has nowhere for previews.
            told.put(replace(said, preview=None) if isinstance(said, Shown) else said)

        def rank_work() -> Sequence[str]:
            store = self._store or dist.TCPStore(*meeting, count)
            _use_host(device)
            ranks = join(rank, count, device, store)
            tell(STARTED)
            return work(Rank(device, ranks, self._cancel, tell))

        threading.Thread(target=lambda: told.put(outcome(rank_work)), daemon=True).start()
        said = None
        while not isinstance(said, Outcome):
            said = told.get()
            yield said


def _use_host(device: str) -> None:
    """As a rank has it that no cluster started: all of the CPU's cores beside a GPU; Gloo at the address Ray uses."""
    if device != "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
        return
    # Of Ray's own copy.
    import psutil
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
