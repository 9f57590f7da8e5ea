"""The processes of one video, and how a step's forwards are laid out on them.

A layout is a mesh of two axes: guidance passes run on ranks of their own ("cfg"), and those of a pass share its
sequence ("ulysses"). Each step takes the layout that ends first; a tie goes to more passes at once, which talk least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..wanvideo.footage import MemoryFootage
from ..wanvideo.shard import WHOLE, Job, Ranks, Shard, Writer
from .copies import exchange_of
from .exchange import Exchange
from .sequence import SequenceShard
from .writer import SharedWriter


def passes_at_once(jobs: int, ranks: int) -> int:
    """How many of a step's passes run at a time: a divisor of the ranks, which need not be one of the passes."""
    fits = (count for count in range(1, min(jobs, ranks) + 1) if ranks % count == 0)
    return min(fits, key=lambda count: (-(-jobs // count) * count, -count))


class ProcessRanks(Ranks):
    """The ranks of torch.distributed's default group, which must be there. device: of this rank.

    video_is_read: whether ranks that follow go on from the frames of a video that is made in windows.
    """

    def __init__(self, device: torch.device) -> None:
        self.video_is_read = False
        self._device = device
        self._world = dist.get_world_size()
        self._rank = dist.get_rank()
        self._passes = 1
        self._exchanges: dict[int, Exchange | None] = {}

    @functools.cached_property
    def _meshes(self) -> dict[int, DeviceMesh]:
        counts = (count for count in range(1, self._world + 1) if self._world % count == 0)
        names = ("cfg", "ulysses")
        return {
            count: init_device_mesh(self._device.type, (count, self._world // count), mesh_dim_names=names)
            for count in counts
        }

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self._rank == 0

    @property
    def layout(self) -> int:
        """Passes at a time."""
        return self._passes

    def check(self, heads: int) -> None:
        """Raises ValueError for a model with fewer attention heads than there are ranks."""
        if heads < self._world:
            raise ValueError(
                f"The model has {heads} attention heads, which {self._world} GPUs cannot share: use --gpus {heads} or "
                "fewer."
            )

    def _group(self, axis: str) -> dist.ProcessGroup:
        return self._meshes[self._passes].get_group(axis)

    def shard(self, grid: tuple[int, int, int], tokens: int) -> Shard:
        """A share of the places of every frame, among the ranks of this pass."""
        ranks = self._world // self._passes
        if ranks == 1:
            return WHOLE
        frames, places = grid[0], grid[1] * grid[2]
        if places < ranks:
            raise ValueError(f"A frame has {places} tokens, too few for {ranks} GPUs: use fewer, or a larger video.")
        group = self._group("ulysses")
        return SequenceShard(
            group=group.group_name,
            rank=dist.get_rank(group),
            ranks=ranks,
            frame_count=frames,
            places=places,
            behind=tokens - frames * places,
            exchange=self._exchange(group),
        )

    def _exchange(self, group: dist.ProcessGroup) -> Exchange | None:
        """Of the ranks that share a pass, with memory of their own: ranks of another layout may be a step ahead."""
        if self._passes not in self._exchanges:
            self._exchanges[self._passes] = exchange_of(group, self._device)
        return self._exchanges[self._passes]

    def each(
        self, jobs: Sequence[Sequence[Job]], run: Callable[[Sequence[Job]], Tensor], *, together: bool = False
    ) -> list[Tensor]:
        """Each pass on its ranks, which then send the result to the others."""
        self._passes = 1 if together else passes_at_once(len(jobs), self._world)
        group, mine = self._group("cfg"), self._meshes[self._passes].get_local_rank("cfg")
        own = {place: run(job).contiguous() for place, job in enumerate(jobs) if place % self._passes == mine}
        shape = next(iter(own.values())).shape[1:]
        results = []
        for place, job in enumerate(jobs):
            result = own.get(place)
            if result is None:
                result = torch.empty(len(job), *shape, device=self._device)
            if self._passes > 1:
                dist.broadcast(result, group=group, group_src=place % self._passes)
            results.append(result)
        return results

    def spread(self, parts: Sequence[Callable[[], Iterable[Tensor]]]) -> Iterator[Iterable[Tensor]]:
        """A part for each rank, then the next ones; each rank sends what it made to all."""
        for first in range(0, len(parts), self._world):
            mine = first + self._rank
            own = list(parts[mine]()) if mine < len(parts) else []
            for source in range(min(self._world, len(parts) - first)):
                yield self._sent(own, source)

    def _sent(self, own: list[Tensor], source: int) -> Iterator[Tensor]:
        """The tensors of a rank, on every rank; one at a time, as a whole part may be more than the device has room."""
        box = [[t.shape for t in own]]
        dist.broadcast_object_list(box, src=source, device=self._device)
        for place, shape in enumerate(box[0]):
            if source == self._rank:
                sent = own[place].to(self._device).contiguous()
            else:
                sent = torch.empty(shape, device=self._device)
            dist.broadcast(sent, src=source)
            yield sent.cpu()

    def same(self, t: Tensor) -> Tensor:
        """A broadcast."""
        t = t.clone(memory_format=torch.contiguous_format)
        dist.broadcast(t, src=0)
        return t

    def agreed(self, choice: bool) -> bool:
        """A broadcast among the ranks of this pass."""
        group = self._group("ulysses")
        flag = torch.tensor(choice, dtype=torch.uint8, device=self._device)
        dist.broadcast(flag, group=group, group_src=0)
        return bool(flag)

    def writer(self, writer: Writer) -> Writer:
        """The first rank writes, and tells the others where it went on; frames in a folder stay there."""
        if self.leads:
            return SharedWriter(writer, self)
        read = self.video_is_read and isinstance(writer, MemoryFootage)
        return SharedWriter(None, self, copy=writer if read else None)

    def told(self, value: object) -> object:
        """What the first rank says, on every rank. Tensors lie in main memory."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]
