"""Block swap: which blocks wait in main memory, and are on the device only while they run.

Weights are read only, so nothing is ever copied back. Where they wait is in host_slabs.py, how they come in swapper.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..attention import Attention
from ..host.residence import Residence, tensors_of
from .arrival import Arrival
from .device_copies import Copies, copies_for
from .host_slabs import Unit, warn_of_pageable
from .memory import AT_ONCE, WORKSPACES, Footprint, footprint_of, gigabytes, usual_work
from .modules.model import WanModel
from .swapper import Swapper

log = logging.getLogger("wanvideo")

AUTOMATIC = -1
# Modules outside the blocks that are worth a slab; img_emb is of models with CLIP.
EMBEDDINGS = ("text_embedding", "time_projection", "img_emb")


@dataclass(frozen=True, kw_only=True)
class BlockSwapArgs:
    """Settings of WanVideoBlockSwap (socket BLOCKSWAPARGS).

    blocks_to_swap: blocks that wait, spread evenly among those that stay; -1: as many as the device's free memory asks
    for. others: the same for further block lists, by name; embeddings: names of modules that wait too. share: of all
    block lists, in the place of numbers, and with 1 of the embeddings, too. prefetch_blocks:
    how many blocks are on their way while one runs, at least 1; each takes a slab on the device. block_swap_debug: log
    each copy. use_non_blocking: kept for saved graphs; the host never waits for a copy from pinned memory.
    """

    blocks_to_swap: int = 20
    others: Mapping[str, int] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    share: float | None = None
    use_non_blocking: bool = False
    prefetch_blocks: int = 0
    block_swap_debug: bool = False

    @property
    def waits(self) -> bool:
        """Whether any blocks are to wait, or may."""
        return self.blocks_to_swap != 0 if self.share is None else self.share > 0


class ShortOfMemoryError(torch.OutOfMemoryError):
    """The GPU's memory did not suffice; the message says what would. ComfyUI frees its models on such errors."""


class Placement:
    """Where the parts of a transformer are. Serves as the `place` callback of the host's memory management.

    work, attention: what the next run computes, and with which self-attention. overlaps: whether blocks that stay may
    still be on their way when a run begins, whose visits then wait for them. reserved: bytes of the device that -1
    leaves alone. copies_for: how bytes reach a device.
    """

    def __init__(
        self,
        model: WanModel,
        offload: torch.device,
        *,
        reserved: int = 0,
        copies_for: Callable[[torch.device], Copies] = copies_for,
    ) -> None:
        self._reserved = reserved
        self.swap: BlockSwapArgs | None = None
        self.work = usual_work(model.config)
        self.attention: Attention | None = None
        self.overlaps = False
        self.copies_for = copies_for
        self._model = model
        self._offload = offload
        self._residence = Residence()
        self._copies: Copies | None = None
        self._arrival: Arrival | None = None
        self._units: dict[nn.Module, Unit] = {}
        self._automatic: int | None = None
        self._told = False

    def __call__(self, device: torch.device) -> None:
        """To the device, but for the parts that wait; to the offload device, all of it, with nothing pinned."""
        if device == self._offload:
            self.arrive()
            self._release(keep=0)
            self._automatic = None
            self._move(device)
            return
        try:
            self._settle(device)
        except BaseException:
            self._release(keep=0)
            raise

    def leave_main_memory(self) -> None:
        """Keep nothing there of what is on the device, for a model that is to stay on it."""
        self._residence.forget()

    def arrive(self) -> None:
        """Wait for all that is on its way. Where something did not come, the model is in main memory afterwards."""
        arrival, self._arrival = self._arrival, None
        if arrival is None:
            return
        try:
            arrival.finish()
        except BaseException:
            self._move(self._offload)
            raise

    @contextmanager
    def swapping(self, device: torch.device) -> Iterator[None]:
        """Inside, the model brings waiting parts to `device` around their turn.

        Slabs on the device live as long as this context. Those in main memory stay pinned for the next one, until the
        model leaves the device or an error leaves this context.
        """
        if device == self._offload:
            yield
            return
        # Tensors may have joined since the model was placed: a LoRA's.
        self(device)
        keep = 0
        try:
            with ExitStack() as stack:
                if self._units:
                    self._swap_parts(stack)
                elif self._arrival is not None:
                    stack.callback(setattr, self._model, "visit", self._model.visit)
                    self._model.visit = self._arrival.visit
                yield
            keep = 1
        finally:
            self._release(keep=keep)

    def _swap_parts(self, stack: ExitStack) -> None:
        """From here until the stack ends, visits and forwards of waiting parts bring them."""
        ahead, debug = self.swap.prefetch_blocks, self.swap.block_swap_debug
        swapper = Swapper(list(self._units.values()), self._copies, ahead=ahead, debug=debug)
        stack.callback(swapper.close)
        stack.callback(setattr, self._model, "visit", self._model.visit)
        self._model.visit = swapper.visit
        for module in self._embeddings():
            stack.enter_context(_visited_in_forward(module, swapper))

    @property
    def waits(self) -> bool:
        """Whether parts wait in main memory, as of the last time that the model was placed."""
        return bool(self._units)

    def waiting_blocks(self) -> list[nn.Module]:
        """Of every list as many as the settings say, in the order of their lists."""
        if self.swap is None:
            return []
        stacks = self._model.stacks()
        if self.swap.share is not None:
            counts = {name: math.ceil(self.swap.share * len(blocks)) for name, blocks in stacks.items()}
        else:
            counts = {"blocks": self.swap.blocks_to_swap, **self.swap.others}
        if counts["blocks"] == AUTOMATIC:
            if self._automatic is None:
                self._automatic = self._count_for(self._copies.free())
            counts["blocks"] = self._automatic
        return [block for name, blocks in stacks.items() for block in spread(blocks, counts.get(name, 0))]

    def footprint(self) -> Footprint:
        """What the next run takes. Blocks of other lists than the transformer's own count as what stays."""
        whole = footprint_of(self._model, self.work, self.attention)
        own = len(self._model.blocks)
        return replace(whole, blocks=whole.blocks[:own], outside=whole.outside + sum(whole.blocks[own:]))

    @property
    def at_once(self) -> int:
        """How many tokens run in one piece: all of them, 0, unless parts wait or memory is short all the same."""
        if self.waits:
            return AT_ONCE
        if self._copies is None or not self._copies.measures:
            return 0
        return AT_ONCE if self._copies.free() < self.footprint().all_at_once + WORKSPACES else 0

    def _count_for(self, free: int) -> int:
        """How few blocks may wait with that many bytes free on the device, where the model may have parts already.

        Raises ValueError where all of them are not enough.
        """
        footprint, blocks = self.footprint(), len(self._model.blocks)
        slabs = max(self.swap.prefetch_blocks, 1) + 1
        room = free + self._here() - self._reserved
        least = footprint.least_waiting(room, slabs)
        if least is None:
            raise ValueError(
                f"The run needs {gigabytes(footprint.peak(blocks, slabs))} of GPU memory even with all {blocks} blocks "
                f"in main memory, and {gigabytes(room)} are free: make the video smaller or shorter, or close what "
                "uses the GPU."
            )
        if least:
            log.info("Block swap: %d of %d blocks wait in main memory.", least, blocks)
        return least

    def resident_bytes(self) -> int:
        """How much of the weights is on the device during a run, slabs aside; all of it where -1 has not chosen yet."""
        if self.swap is not None and self.swap.blocks_to_swap == AUTOMATIC and self._automatic is None:
            waiting: list[nn.Module] = []
        else:
            waiting = [*self._embeddings(), *self.waiting_blocks()]
        return _size(self._model) - sum(_size(part) for part in waiting)

    def working_bytes(self) -> int:
        """What a run takes besides: slabs and activations."""
        footprint, count = self.footprint(), len(self._model.blocks)
        swaps = self.swap is not None and self.swap.waits
        slabs = (max(self.swap.prefetch_blocks, 1) + 1) * max(footprint.blocks) if swaps and count else 0
        return slabs + (footprint.in_pieces if swaps else footprint.all_at_once) + WORKSPACES

    def short_of_memory(self) -> ShortOfMemoryError:
        """What to tell a user whose run did not fit, now that what it computed is freed."""
        footprint, count = self.footprint(), len(self._model.blocks)
        waiting = sum(block in self._units for block in self._model.blocks)
        tokens = f"{self.work.tokens * self.work.batch} tokens"
        measured = self._copies is not None and self._copies.measures
        room = self._copies.free() + self._here() - self._reserved if measured else 0
        least = footprint.least_waiting(room)
        if least is not None and least > waiting:
            remedy = f"with {least} of {count} blocks swapped (WanVideoBlockSwap, blocks_to_swap {least}) it would fit"
        else:
            fixed = footprint.peak(count) - footprint.in_pieces
            part = min(max(room - fixed, 0) / footprint.in_pieces, 0.9)
            remedy = f"even with all {count} blocks swapped it takes {gigabytes(footprint.peak(count))}: "
            remedy += f"make the video smaller or shorter, to {part:.0%} of its size, or close what uses the GPU"
        needs = f"a run of {tokens} takes about {gigabytes(footprint.peak(waiting))}"
        free = f", and {gigabytes(room)} were free" if measured else ""
        return ShortOfMemoryError(f"The GPU ran out of memory: {needs}{free}; {remedy}.")

    def _here(self) -> int:
        return sum(t.nbytes for t in tensors_of(self._model) if t.device == self._copies.device)

    def _settle(self, device: torch.device) -> None:
        """Every part where it belongs while the model is on `device`."""
        if self._copies is None or self._copies.device != device:
            self._copies = self.copies_for(device)
        waiting = [*self._embeddings(), *self.waiting_blocks()]
        before, self._units = self._units, {part: self._units.get(part) or Unit(part) for part in waiting}
        for part in before.keys() - self._units.keys():
            before[part].release()
        for unit in self._units.values():
            self._residence.move(unit.tensors(), self._offload)
            unit.gather(self._copies)
        if self.overlaps and self._copies.overlap and not self._units and self._arrival is None:
            self._send_blocks()
        self._move(device)
        self._told = self._told or warn_of_pageable(self._units.values())

    def _send_blocks(self) -> None:
        """Blocks get their memory now, and their values in the order in which they run."""
        blocks = (block for stack in self._model.stacks().values() for block in stack)
        try:
            pairs = {block: self._residence.place(tensors_of(block), self._copies.device) for block in blocks}
            if any(pairs.values()):
                self._arrival = Arrival(pairs, self._copies)
        except BaseException:
            self._move(self._offload)
            raise

    def _move(self, device: torch.device) -> None:
        """What has no slab goes to the device."""
        waiting = {id(tensor) for unit in self._units.values() for tensor in unit.tensors()}
        self._residence.move([t for t in tensors_of(self._model) if id(t) not in waiting], device)

    def _release(self, *, keep: int) -> None:
        for unit in self._units.values():
            unit.release(keep=keep)

    def _embeddings(self) -> list[nn.Module]:
        names = () if self.swap is None else self.swap.embeddings
        if self.swap is not None and self.swap.share == 1:
            names = EMBEDDINGS
        return [getattr(self._model, name) for name in names if hasattr(self._model, name)]


def spread(blocks: nn.ModuleList, count: int) -> list[nn.Module]:
    """`count` of the blocks, evenly: a block that stays gives the copies of all others the same time."""
    total, count = len(blocks), min(count, len(blocks))
    return [block for i, block in enumerate(blocks) if (i + 1) * count // total > i * count // total]


@contextmanager
def _visited_in_forward(module: nn.Module, swapper: Swapper) -> Iterator[None]:
    """Inside, each forward of the module is a visit."""
    with ExitStack() as visit:
        enter = module.register_forward_pre_hook(lambda *_: visit.enter_context(swapper.visit(module)))
        leave = module.register_forward_hook(lambda *_: visit.close(), always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()


def _size(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))
