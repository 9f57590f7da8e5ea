"""A Ray cluster that this process is a driver of. A cluster runs code of whoever reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

GET = "pip install 'comfyui-wanvideo-aligned[ray]'"


def connect(address: str) -> ModuleType:
    """Ray, connected; 'local' starts a cluster of this host for this run.

    Raises ImportError where Ray is not installed, and ConnectionError where there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--ray needs the package 'ray', which is not installed: {GET}.") from error
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"There is no Ray cluster at '{address}' ({error}): ray start --head starts one. One that asks for a token "
            "needs RAY_AUTH_MODE=token here, and its ~/.ray/auth_token."
        ) from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """For as long as this lasts; then Ray ends what was started."""
    ray = connect(address)
    try:
        yield ray
    finally:
        ray.shutdown()


def room(ray: ModuleType, address: str, *, kind: str, each: int = 1, wanted: int = 1) -> int:
    """How many processes of `each` GPUs or CPUs the cluster takes. Raises ValueError where fewer than are wanted."""
    found = int(ray.cluster_resources().get(kind, 0)) // each
    if found < wanted:
        raise ValueError(
            f"{wanted} workers of {each} {kind} each were asked for, but the Ray cluster at '{address}' has "
            f"room for {found}: start more nodes (ray start --address ...), or ask for fewer."
        )
    return found


def why(error: Exception) -> str:
    """Of what Ray says about a process that it lost, the line that says why: of a traceback the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason"]
    return lines[-1 if "ray::" in lines[0] else 0].rstrip(".")
