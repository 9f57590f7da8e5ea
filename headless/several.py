"""A workflow on several GPUs: every rank runs the nodes up to the samplers, the first one alone what follows."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial

from ..distributed.host import RankHost
from ..distributed.launch import Rank, launch
from ..host import set_host
from .check import check
from .graph import Link, Node
from .job import Job, show
from .memory_plan import head_counts
from .runner import Runner, samples


def run_on_several(job: Job, count: int, device: str) -> None:
    """Run it on so many ranks of this host.

    Raises as `launch`, before anything starts GraphError for what is wrong with the workflow, and ValueError for a
    transformer that so many cannot share.
    """
    host = job.folders.host(RankHost, "cpu")
    set_host(host)
    prompt, classes = job.prompt()
    for name, heads in head_counts(check(prompt, classes, host), prompt, classes, host):
        if heads < count:
            raise ValueError(
                f"{name} has {heads} attention heads, which {count} GPUs cannot share: use --gpus {heads} or fewer."
            )
    launch(partial(_work, job), count=count, device=device)


class FollowingRunner(Runner):
    """Executes samplers, and what they need: nothing that decodes, saves or shows a result."""

    def _needed(self, nodes: list[Node]) -> list[Node]:
        wanted: set[str] = set()
        for node in reversed(nodes):
            if node.id in wanted or samples(self._classes[node.type]):
                wanted.add(node.id)
                wanted |= {value.node for value in node.inputs.values() if isinstance(value, Link)}
        return [node for node in nodes if node.id in wanted]


def _work(job: Job, rank: Rank) -> None:
    leads = rank.ranks.leads
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, format="%(message)s", stream=sys.stderr)
    host = job.folders.host(RankHost, rank.device)
    host.ranks = rank.ranks
    set_host(host)
    if leads:
        signal.signal(signal.SIGTERM, lambda *_: host.cancel.set())
        show(Runner(*job.prompt(), host).run())
    else:
        FollowingRunner(*job.prompt(), host).run()
