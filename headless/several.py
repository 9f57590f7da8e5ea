"""A workflow on several GPUs: all ranks run samplers, decoding by tiles and what these need, the first one the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..distributed.host import RankHost
from ..distributed.launch import launch
from ..distributed.rank import Rank
from ..distributed.ray_ranks import launch_on_ray
from ..distributed.told import ToldLog
from ..host import set_host
from ..host.standalone import TerminalProgress
from .check import check
from .graph import Link, Node
from .job import Job, lines
from .memory_plan import head_counts
from .runner import Runner, decodes_tiles, samples


def run_on_several(job: Job, count: int, device: str, ray: str | None = None) -> Sequence[str]:
    """Run it on so many ranks of this host, or of the Ray cluster at this address; returns the lines that it shows.

    Raises as `launch` and `launch_on_ray`, before anything starts GraphError for what is wrong with the workflow, and
    ValueError for a transformer that so many cannot share.
    """
    host = job.folders.host(RankHost, "cpu")
    set_host(host)
    prompt, classes = job.prompt()
    for name, heads in head_counts(check(prompt, classes, host), prompt, classes, host):
        if heads < count:
            raise ValueError(
                f"{name} has {heads} attention heads, which {count} GPUs cannot share: use --gpus {heads} or fewer."
            )
    if ray is None:
        return launch(partial(_work, job), count=count, device=device)
    job = replace(job, folders=job.folders.absolute())
    return launch_on_ray(partial(_work, job), address=ray, count=count, device=device, progress=TerminalProgress)


class FollowingRunner(Runner):
    """Executes samplers, decoding by tiles, and what they need: nothing else that decodes, saves or shows a result."""

    def _needed(self, nodes: list[Node]) -> list[Node]:
        wanted: set[str] = set()
        self._feeding: set[str] = set()
        for node in reversed(nodes):
            cls = self._classes[node.type]
            makers = {value.node for value in node.inputs.values() if isinstance(value, Link)}
            if node.id in self._feeding or samples(cls):
                self._feeding |= makers
                wanted |= {node.id, *makers}
            elif node.id in wanted or decodes_tiles(cls, node.inputs):
                wanted |= {node.id, *makers}
        return [node for node in nodes if node.id in wanted]

    def _execute(self, node: Node) -> None:
        # The frames of a video are held for another sampler alone: every rank of a host would hold them.
        self._host.ranks.video_is_read = node.id in self._feeding
        super()._execute(node)


def _work(job: Job, rank: Rank) -> Sequence[str]:
    leads = rank.ranks.leads
    voice = logging.StreamHandler() if rank.tell is None else ToldLog(rank.tell)
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, format="%(message)s", handlers=[voice])
    host = job.folders.host(RankHost, rank.device)
    host.ranks, host.cancel, host.tell = rank.ranks, rank.cancel, rank.tell
    set_host(host)
    return lines((Runner if leads else FollowingRunner)(*job.prompt(), host).run())
