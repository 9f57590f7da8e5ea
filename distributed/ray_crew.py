"""Ray's actors as a crew: Ray places them on hosts with free GPUs; one that died is replaced, wherever there is room.

It carries jobs and reasons, never tensors. Every host needs this package, and the folders under the same paths.
"""

from __future__ import annotations

from functools import partial

from .crew import End, Work, attempt
from .ray_cluster import connect, room, why


class RayCrew:
    """As many workers as were asked for, or as the cluster has room for. gpus: of each; 0 runs on a CPU."""

    def __init__(self, work: Work, *, address: str, gpus: int, workers: int | None = None) -> None:
        ray = self._ray = connect(address)
        kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
        found = room(ray, address, kind=kind, each=each, wanted=workers or 1)
        self.size = workers or found
        actor = ray.remote(num_gpus=gpus, num_cpus=1)(_Actor)
        self._new = partial(actor.remote, work)
        self._actors = [self._new() for _ in range(self.size)]
        self._busy: dict[object, int] = {}

    def begin(self, worker: int, job: object) -> None:
        """Queued until the actor, perhaps a new one, is there: Ray finds a host with room."""
        self._busy[self._actors[worker].run.remote(job)] = worker

    def next(self) -> End:
        """The first that ends; a lost actor or host is a reason to try again."""
        (done,), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker = self._busy.pop(done)
        try:
            shown, failure, again = self._ray.get(done)
        except self._ray.exceptions.RayActorError as error:
            # One that Ray restarts refuses jobs meanwhile; a new one queues them.
            self._actors[worker] = self._new()
            return End(worker, failure=f"its worker or machine died ({why(error)})", again=True)
        if again:
            # After a fault of the GPU a process is of no more use.
            self._ray.kill(self._actors[worker])
            self._actors[worker] = self._new()
        return End(worker, shown, failure, again)

    def close(self) -> None:
        """Leave the cluster; Ray ends the actors."""
        self._ray.shutdown()


class _Actor:
    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, job: object) -> tuple[object, ...]:
        return attempt(self._work, job)
