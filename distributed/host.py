"""The host of one rank: its own GPU, the first rank's voice, and models that share their forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from ..host import Host, Managed, Place, Progress, StandaloneHost
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import ALONE, Ranks
from .ranks import ProcessRanks
from .told import Tell, ToldProgress


class SilentProgress:
    """The first rank shows the bar."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        return None

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """Nothing."""


class RankHost(StandaloneHost):
    """A StandaloneHost whose transformers are shared by all ranks. tell: takes its progress, if not its terminal."""

    ranks: ProcessRanks
    tell: Tell | None = None

    def manage(
        self, module: nn.Module, *, place: Place | None = None, resident: Callable[[], int] | None = None
    ) -> Managed:
        """As elsewhere. Raises ValueError for a transformer with fewer heads than there are ranks."""
        if isinstance(module, WanModel):
            self.ranks.check(module.config.num_heads)
            module.ranks = self.ranks
        return super().manage(module, place=place, resident=resident)

    def progress(self, total: int, label: str = "") -> Progress:
        """On the first rank."""
        if not self.ranks.leads:
            return SilentProgress()
        return super().progress(total, label) if self.tell is None else ToldProgress(self.tell, total, label)


def ranks_of(host: Host) -> Ranks:
    """Those that all execute the node that asks, where the runner lets them: samplers, and decoding by tiles."""
    return host.ranks if isinstance(host, RankHost) else ALONE
