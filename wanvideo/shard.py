"""The seam at which one forward is shared out among processes. The two classes here are one process: they do nothing.

The model, its systems and guidance ask a `Shard` and a `Ranks` and know of no other process; `distributed/` brings
those of several.

Shapes: B batch, L tokens of the whole sequence, l of this process, H heads, h of this process, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..attention import Attention, FusedAttention

Job, Writer = TypeVar("Job"), TypeVar("Writer")
# A tensor that may still be on its way from other processes: the call waits for it.
Arriving = Callable[[], Tensor]


@dataclass(frozen=True)
class Shard:
    """The part of a token sequence that this process has: here, all of it.

    A sequence is frames of equally many tokens, and whatever systems appended behind them. A process has the same
    places of every frame, so that its part is a smaller grid, and a piece of what is behind.
    """

    def take(self, t: Tensor, dim: int = 1) -> Tensor:
        """Of a tensor with the first tokens of the whole sequence along `dim`, those of this process."""
        return t

    def grid(self, whole: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of this process's video tokens, of the whole video's."""
        return whole

    def count(self, tokens: int) -> int:
        """How many of the first `tokens` of the whole sequence are here."""
        return tokens

    def first(self, tokens: int) -> Shard:
        """The part of the sequence that ends after so many tokens of the whole one, or of one with fewer frames."""
        return self

    def rest(self, start: int) -> Shard:
        """The part of the sequence that begins at this token, the first one behind the video."""
        return self

    def appended(self, t: Tensor) -> Tensor:
        """Tokens of this process [B, n, ...], all that it has behind the video, from all processes: [B, N, ...]."""
        return t

    def frames(self, t: Tensor) -> Tensor:
        """Video tokens of this process [B, l, ...], of whole frames, from all processes: [B, L, ...]."""
        return t

    def mean(self, over_tokens: Tensor) -> Tensor:
        """The mean over all video tokens, of the mean over those of this process."""
        return over_tokens

    def extremes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest values over the tokens of all processes: t [B, l, C] -> twice [B, 1, C]."""
        return t.amin(dim=1, keepdim=True), t.amax(dim=1, keepdim=True)

    def heads(self, t: Tensor, *, in_order: bool) -> Arriving:
        """[B, l, H, D] -> [B, L, h, D]: the whole sequence for this process's share of the heads.

        in_order: the tokens come in the order of the whole sequence, which attention of all to all does not need. What
        comes may lie in memory that the next block's takes: it is read before, or copied.
        """
        return lambda: t

    def tokens(self, t: Tensor, *, heads: int, in_order: bool) -> Tensor:
        """The way back: [B, L, h, D] -> [B, l, H, D], in memory that the next block's may take. heads: H."""
        return t

    def fused(self, attention: Attention) -> FusedAttention | None:
        """The backend's form that takes projections as they are, if it has one that can run on this part."""
        return attention if isinstance(attention, FusedAttention) else None


WHOLE = Shard()


class Ranks:
    """The processes that share a forward, of which this is one: here, the only one."""

    @property
    def layout(self) -> Hashable:
        """Equal for forwards of which this process has the same part, as what it remembers of them must be."""
        return None

    def shard(self, grid: tuple[int, int, int], tokens: int) -> Shard:
        """The part of this process of a sequence of `tokens`, of which the first are a video's.

        Raises ValueError where there are fewer places in a frame than processes.
        """
        return WHOLE

    def each(
        self, jobs: Sequence[Sequence[Job]], run: Callable[[Sequence[Job]], Tensor], *, together: bool = False
    ) -> list[Tensor]:
        """The result of each job, [rows of the job, ...], wherever it ran; together: all processes run each."""
        return [run(job) for job in jobs]

    def spread(self, parts: Sequence[Callable[[], Iterable[Tensor]]]) -> Iterator[Iterable[Tensor]]:
        """What each part makes, float32 in main memory, in their order; several are made at a time where there are
        several processes, all of which must ask."""
        return (part() for part in parts)

    def same(self, t: Tensor) -> Tensor:
        """The tensor of the leading process, so that rounding in others cannot lead them apart."""
        return t

    def agreed(self, choice: bool) -> bool:
        """What the leading process of a forward chose: all must leave a step out, or none."""
        return choice

    def writer(self, writer: Writer) -> Writer:
        """What writes results as they are made; only one process may."""
        return writer


ALONE = Ranks()
