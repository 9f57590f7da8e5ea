"""Ray's actors as a crew: Ray places them on hosts with free GPUs; one that died is replaced, wherever there is room.

It carries jobs and reasons, never tensors. Every host needs this package, and the folders under the same paths.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from .crew import End, Work, attempt

GET = "pip install 'comfyui-wanvideo-aligned[ray]'"


class RayCrew:
    """As many workers as were asked for, or as the cluster has room for. gpus: of each; 0 runs on a CPU."""

    def __init__(self, work: Work, *, address: str, gpus: int, workers: int | None = None) -> None:
        ray = self._ray = _ray()
        _connect(ray, address)
        kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
        room = int(ray.cluster_resources().get(kind, 0)) // each
        if room < (workers or 1):
            raise ValueError(
                f"{workers or 1} workers of {each} {kind} each were asked for, but the Ray cluster at '{address}' has "
                f"room for {room}: start more nodes (ray start --address ...), or ask for fewer."
            )
        self.size = workers or room
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
            why = (str(error).strip().splitlines() or ["no reason"])[0]
            # One that Ray restarts refuses jobs meanwhile; a new one queues them.
            self._actors[worker] = self._new()
            return End(worker, failure=f"its worker or machine died ({why})", again=True)
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


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--ray needs the package 'ray', which is not installed: {GET}.") from error
    return ray


def _connect(ray: ModuleType, address: str) -> None:
    """'local' starts a cluster of this host for this run. Raises ConnectionError where there is none."""
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = f"There is no Ray cluster at '{address}' ({error}): ray start --head starts one."
        raise ConnectionError(why) from error
