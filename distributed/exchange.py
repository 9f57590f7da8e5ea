"""How parts of a tensor go to the other ranks of a group: what an exchange is told, and the one by collectives.

A block has four, in this order: of v, q and k before self-attention, and of its result behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ..wanvideo.shard import Arriving

Shape = tuple[int, ...]
Views = tuple[Tensor, ...]


class Route(NamedTuple):
    """What of a tensor goes where, on every rank alike.

    sent: what each rank gets of the tensor that is here. shapes: of each rank's result. placed: of a rank's result
    (the result, that rank, the rank it comes from) the views where that lies, in the shapes in which it is sent.
    in_turn: what comes from the ranks lies in the result one behind the other.
    """

    sent: Sequence[Views]
    shapes: Sequence[Shape]
    placed: Callable[[Tensor, int, int], Views]
    in_turn: bool


class Exchange(Protocol):
    """Begins an exchange, as every rank of the group does; the call that it gives waits for the result on this one.

    The memory of a result may be taken by the fourth exchange after it: the same one of the next block.
    """

    def __call__(self, route: Route) -> Arriving:
        """Begin."""


class Collectives:
    """By torch's functional all-to-all, which compiled graphs may contain: any device, any number of hosts."""

    # No dataclass: one that is made within a graph has no fields there in PyTorch 2.11.
    def __init__(self, group: str, rank: int) -> None:
        self.group, self.rank = group, rank

    def __call__(self, route: Route) -> Arriving:
        """Packs what goes, and unpacks what comes, unless it comes as it lies."""
        parts = [part for views in route.sent for part in views]
        packed = parts[0].new_empty(_count(parts))
        for part, piece in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            piece.view(part.shape).copy_(part)
        shape = route.shapes[self.rank]
        # No memory: it is asked for the sizes of views alone.
        outline = packed.new_empty(()).expand(shape)
        receives = [_count(route.placed(outline, self.rank, source)) for source in range(len(route.sent))]
        sends = [_count(views) for views in route.sent]
        # The wrapper of this operator waits at once where it is traced.
        received = torch.ops._c10d_functional.all_to_all_single(packed, receives, sends, self.group)

        def arrived() -> Tensor:
            flat = collectives.wait_tensor(received)
            if route.in_turn:
                return flat.view(shape)
            result = flat.new_empty(shape)
            places = [view for source in range(len(receives)) for view in route.placed(result, self.rank, source)]
            for place, piece in zip(places, flat.split([place.numel() for place in places]), strict=True):
                place.copy_(piece.view(place.shape))
            return result

        return arrived


def _count(views: Sequence[Tensor]) -> int:
    return sum(view.numel() for view in views)
