"""Sequence parallelism: every process has the same places of all frames, and a share of the heads in self-attention.

Before self-attention an exchange gives each process all tokens of its heads, and one behind it gives them back, so that
any attention kernel runs as it is (DeepSpeed-Ulysses, Jacobs et al. 2023). Shares may be unequal: nothing is padded but
in gathers.

The collectives are torch's functional ones, which compiled graphs may contain; `copies.py` exchanges heads without one
where it can. An exchange begins as soon as its tensor is there and is waited for where its result is read: v is sent
before q is projected and q before k is. Groups of heads, attention of one beside the exchange of the next, would hide
more of it and, by NCCL, make both slower by as much (docs/scale.md).

Shapes: B batch, L tokens of the whole sequence, l of this process, H heads, h of this process, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ..attention import Attention
from ..wanvideo.shard import Arriving, Shard
from .exchange import Collectives, Exchange, Route, Views

Sizes = tuple[int, ...]
APPENDED_TWICE = (
    "Two systems append reference tokens to the video, and one of them reads its own: several GPUs cannot share that; "
    "run it on one."
)


def shares(total: int, ranks: int) -> Sizes:
    """How many of `total` each of the ranks has: as equal as can be, the first ones one more."""
    return tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))


def span(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Start and end of a rank's share."""
    ends = (0, *accumulate(sizes))
    return ends[rank], ends[rank + 1]


@dataclass(frozen=True)
class SequenceShard(Shard):
    """The part of rank `rank` of the process group named `group`, which has `ranks` of them.

    The sequence has `frames` of `places` tokens each, and `behind` more. exchange: how heads are exchanged in blocks
    that are not compiled; None: by collectives.
    """

    group: str
    rank: int
    ranks: int
    frame_count: int
    places: int
    behind: int = 0
    exchange: Exchange | None = field(default=None, compare=False, repr=False)

    @property
    def _here(self) -> tuple[int, int]:
        return span(shares(self.places, self.ranks), self.rank)

    @property
    def lengths(self) -> Sizes:
        """Tokens of each rank."""
        pairs = zip(shares(self.places, self.ranks), shares(self.behind, self.ranks), strict=True)
        return tuple(self.frame_count * places + behind for places, behind in pairs)

    def take(self, t: Tensor, dim: int = 1) -> Tensor:
        """A copy of this rank's tokens."""
        (start, stop), frames = self._here, min(t.shape[dim] // self.places, self.frame_count)
        video = t.narrow(dim, 0, frames * self.places).unflatten(dim, (frames, self.places))
        video = video.narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)
        first, last = span(shares(self.behind, self.ranks), self.rank)
        extra = t.shape[dim] - self.frame_count * self.places
        if extra <= first or first == last:
            return video.contiguous()
        last = min(last, extra)
        return torch.cat((video, t.narrow(dim, self.frame_count * self.places + first, last - first)), dim=dim)

    def grid(self, whole: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames of one row."""
        start, stop = self._here
        return whole[0], 1, stop - start

    def count(self, tokens: int) -> int:
        """Whole frames count by the places that are here."""
        start, stop = self._here
        video = self.frame_count * self.places
        if tokens <= video:
            return tokens // self.places * (stop - start)
        first, last = span(shares(self.behind, self.ranks), self.rank)
        return self.frame_count * (stop - start) + min(max(tokens - video - first, 0), last - first)

    def first(self, tokens: int) -> SequenceShard:
        """Fewer frames, or fewer tokens behind them.

        Raises ValueError where tokens behind the video were appended after that: their ranks would differ.
        """
        video = self.frame_count * self.places
        if tokens <= video:
            return replace(self, frame_count=tokens // self.places, behind=0)
        if tokens != video + self.behind:
            raise ValueError(APPENDED_TWICE)
        return self

    def rest(self, start: int) -> SequenceShard:
        """No frames. Raises ValueError where others appended tokens before these: their ranks would differ."""
        if start != self.frame_count * self.places:
            raise ValueError(APPENDED_TWICE)
        return replace(self, frame_count=0)

    def appended(self, t: Tensor) -> Tensor:
        """An all-gather."""
        return self._gathered(t.movedim(1, 0), shares(self.behind, self.ranks)).movedim(0, 1)

    def frames(self, t: Tensor) -> Tensor:
        """An all-gather."""
        start, stop = self._here
        places = t.unflatten(1, (-1, stop - start)).movedim(2, 0)
        return self._gathered(places, shares(self.places, self.ranks)).movedim(0, 2).flatten(1, 2)

    def _gathered(self, own: Tensor, sizes: Sizes) -> Tensor:
        """Rows [n, ...] of every rank, one behind the other; every rank sends as many as the one with the most."""
        own = F.pad(own, (*(0, 0) * (own.dim() - 1), 0, sizes[0] - own.shape[0])).contiguous()
        every = collectives.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(own, self.ranks, self.group))
        parts = (part[:size] for part, size in zip(every.unflatten(0, (self.ranks, -1)), sizes, strict=True))
        return torch.cat(tuple(parts))

    def mean(self, over_tokens: Tensor) -> Tensor:
        """Weighted by how many places a rank has."""
        start, stop = self._here
        return collectives.all_reduce(over_tokens * ((stop - start) / self.places), "sum", self.group)

    def extremes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """One all-reduce for both."""
        both = torch.cat((-t.amin(dim=1, keepdim=True), t.amax(dim=1, keepdim=True)))
        low, high = collectives.all_reduce(both, "max", self.group).chunk(2)
        return -low, high

    def heads(self, t: Tensor, *, in_order: bool) -> Arriving:
        """The exchange before attention. Raises ValueError where there are fewer heads than ranks."""
        batch, _, heads, size = t.shape
        counts = self._heads(heads)
        # Dense, as kernels mostly leave it: then a part is one strided copy.
        parts = t.contiguous().split(counts, dim=2)
        return self._exchange(
            Route(
                sent=[self._of_part(part, self.rank, in_order) for part in parts],
                shapes=[(batch, sum(self.lengths), count, size) for count in counts],
                placed=lambda result, _, source: self._of_whole(result, source, in_order),
                in_turn=batch == 1 and not in_order,
            )
        )

    def tokens(self, t: Tensor, *, heads: int, in_order: bool) -> Tensor:
        """The exchange behind attention."""
        counts, t = self._heads(heads), t.contiguous()

        def placed(result: Tensor, rank: int, source: int) -> Views:
            return self._of_part(result.split(counts, dim=2)[source], rank, in_order)

        return self._exchange(
            Route(
                sent=[self._of_whole(t, rank, in_order) for rank in range(self.ranks)],
                shapes=[(t.shape[0], length, heads, t.shape[3]) for length in self.lengths],
                placed=placed,
                in_turn=False,
            )
        )()

    @property
    def _exchange(self) -> Exchange:
        """Of the ranks; what is traced into a graph goes by collectives."""
        if torch.compiler.is_compiling() or self.exchange is None:
            return Collectives(self.group, self.rank)
        return self.exchange

    def _heads(self, heads: int) -> Sizes:
        """How many heads each rank has."""
        counts = shares(heads, self.ranks)
        if not counts[-1]:
            raise ValueError(f"{heads} attention heads cannot be shared by {self.ranks} GPUs: use fewer.")
        return counts

    def fused(self, attention: Attention) -> None:
        """None: norms read all heads of a token, and the kernel all tokens of a head."""
        return None

    def _of_whole(self, t: Tensor, rank: int, in_order: bool) -> Views:
        """Of the whole sequence [B, L, ...] the tokens of a rank: in order, the video's [B, frames, places, ...], and
        those behind it; else all of them, as the ranks' tokens then lie one behind the other."""
        if not in_order:
            return (t.split(self.lengths, dim=1)[rank],)
        video, behind = t.split((self.frame_count * self.places, self.behind), dim=1)
        frames = video.unflatten(1, (self.frame_count, self.places))
        places, extra = shares(self.places, self.ranks), shares(self.behind, self.ranks)
        return frames.split(places, dim=2)[rank], behind.split(extra, dim=1)[rank]

    def _of_part(self, t: Tensor, rank: int, in_order: bool) -> Views:
        """The tokens of a rank [B, l, ...] in the same shapes."""
        if not in_order:
            return (t,)
        places, extra = shares(self.places, self.ranks)[rank], shares(self.behind, self.ranks)[rank]
        video, behind = t.split((self.frame_count * places, extra), dim=1)
        return video.unflatten(1, (self.frame_count, places)), behind
