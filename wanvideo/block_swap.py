"""Block swap: which blocks wait in main memory, and are on the device only while they run.

Weights are read only, so nothing is ever copied back. Where they wait is in host_slabs.py, how they come in swapper.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .device_copies import Copies, copies_for
from .host_slabs import Unit
from .modules.model import WanModel
from .swapper import Swapper

log = logging.getLogger("wanvideo")

AUTOMATIC = -1
# What `AUTOMATIC` leaves for activations: 81 frames at 1280x720. The 14B model was seen to hold 22 bytes per token and
# channel at 480p, and its activations grow with both.
TOKENS_720P, BYTES_PER_CHANNEL = 75_600, 24


@dataclass(frozen=True, kw_only=True)
class BlockSwapArgs:
    """Settings of WanVideoBlockSwap (socket BLOCKSWAPARGS).

    blocks_to_swap: blocks that wait, spread evenly among those that stay; -1: as many as the device's free memory asks
    for. others: the same for further block lists, by name; embeddings: names of modules that wait too. prefetch_blocks:
    how many blocks are on their way while one runs, at least 1; each takes a slab on the device. block_swap_debug: log
    each copy. use_non_blocking: kept for saved graphs; the host never waits for a copy from pinned memory.
    """

    blocks_to_swap: int = 20
    others: Mapping[str, int] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    use_non_blocking: bool = False
    prefetch_blocks: int = 0
    block_swap_debug: bool = False


class Placement:
    """Where the parts of a transformer are. Serves as the `place` callback of the host's memory management.

    copies_for: how bytes reach a device.
    """

    def __init__(
        self, model: WanModel, offload: torch.device, *, copies_for: Callable[[torch.device], Copies] = copies_for
    ) -> None:
        self.swap: BlockSwapArgs | None = None
        self.copies_for = copies_for
        self._model = model
        self._offload = offload
        self._copies: Copies | None = None
        self._units: dict[nn.Module, Unit] = {}
        self._automatic: int | None = None
        self._told = False

    def __call__(self, device: torch.device) -> None:
        """To the device, but for the parts that wait; to the offload device, all of it, with nothing pinned."""
        if device == self._offload:
            self._release(keep=0)
            self._automatic = None
            self._move(device)
            return
        try:
            self._settle(device)
        except BaseException:
            self._release(keep=0)
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
        counts = {"blocks": self.swap.blocks_to_swap, **self.swap.others}
        if self.swap.blocks_to_swap == AUTOMATIC:
            if self._automatic is None:
                self._automatic = self._count_for(self._copies.free())
            counts["blocks"] = self._automatic
        stacks = self._model.stacks().items()
        return [block for name, blocks in stacks for block in spread(blocks, counts.get(name, 0))]

    def _count_for(self, free: int) -> int:
        """How few blocks may wait with that many bytes free on the device, where the model may have parts already."""
        config, blocks = self._model.config, self._model.blocks
        needs = TOKENS_720P * config.dim * BYTES_PER_CHANNEL
        swapped = {id(block) for block in blocks}
        rest = sum(_bytes_of(module) for module in self._parts() if id(module) not in swapped)
        here = sum(t.nbytes for t in _tensors(self._model) if t.device == self._copies.device)
        size, room = max(_bytes_of(block) for block in blocks), free + here - needs - rest
        if room >= len(blocks) * size:
            return 0
        slots = max(self.swap.prefetch_blocks, 1) + 1
        staying = min(max(room // size - slots, 0), len(blocks) - 1)
        log.info("Block swap: %d of %d blocks wait in main memory.", len(blocks) - staying, len(blocks))
        return len(blocks) - staying

    def _settle(self, device: torch.device) -> None:
        """Every part where it belongs while the model is on `device`."""
        if self._copies is None or self._copies.device != device:
            self._copies = self.copies_for(device)
        waiting = [*self._embeddings(), *self.waiting_blocks()]
        before, self._units = self._units, {part: self._units.get(part) or Unit(part) for part in waiting}
        for part in before.keys() - self._units.keys():
            before[part].release()
        for unit in self._units.values():
            unit.gather(self._copies)
        self._move(device)
        pageable = sum(not unit.pinned for unit in self._units.values())
        if pageable and not self._told:
            self._told = True
            log.warning(
                "Block swap: the system refuses to pin the memory of %d of %d waiting parts, so that their copies to "
                "the GPU are slower; free main memory, or let fewer blocks wait.",
                pageable,
                len(self._units),
            )

    def _move(self, device: torch.device) -> None:
        """What has no slab goes to the device."""
        for module in self._parts():
            if module not in self._units:
                module.to(device)
        for tensor in (*self._model.parameters(recurse=False), *self._model.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)

    def _release(self, *, keep: int) -> None:
        for unit in self._units.values():
            unit.release(keep=keep)

    def _embeddings(self) -> list[nn.Module]:
        names = () if self.swap is None else self.swap.embeddings
        return [getattr(self._model, name) for name in names if hasattr(self._model, name)]

    def _parts(self) -> list[nn.Module]:
        stacks = self._model.stacks()
        top = [module for name, module in self._model.named_children() if name not in stacks]
        return [*top, *(block for blocks in stacks.values() for block in blocks)]


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


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))
