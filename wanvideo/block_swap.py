"""Block swap: blocks that wait in main memory and are on the device only while they run.

Weights are read only, so nothing is ever copied back: leaving the device means pointing at the waiting copy again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..tensor_layout import kernel_ready
from .modules.model import WanModel

log = logging.getLogger("wanvideo")


@dataclass(frozen=True, kw_only=True)
class BlockSwapArgs:
    """Settings of WanVideoBlockSwap (socket BLOCKSWAPARGS).

    blocks_to_swap: blocks that wait; others: the same for further block lists, by name; embeddings: names of modules
    that wait too; prefetch_blocks: how many are brought ahead of time; block_swap_debug: log each.
    """

    blocks_to_swap: int = 20
    others: Mapping[str, int] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    use_non_blocking: bool = False
    prefetch_blocks: int = 0
    block_swap_debug: bool = False


class Placement:
    """Where the parts of a transformer are. Serves as the `place` callback of the host's memory management."""

    def __init__(self, model: WanModel, offload: torch.device) -> None:
        self.swap: BlockSwapArgs | None = None
        self._model = model
        self._offload = offload

    def __call__(self, device: torch.device) -> None:
        """To the device, but for the blocks that wait; to the offload device, all of it."""
        waiting = [*self.waiting_blocks(), *self._embeddings()] if device != self._offload else []
        held = {id(module) for module in waiting}
        for module in self._parts():
            module.to(self._offload if id(module) in held else device)
        for parameter in self._model.parameters(recurse=False):
            parameter.data = parameter.data.to(device)

    def waiting_blocks(self) -> list[nn.Module]:
        """The last blocks of every list, in the order of their lists."""
        if self.swap is None:
            return []
        counts = {"blocks": self.swap.blocks_to_swap, **self.swap.others}
        stacks = self._model.stacks().items()
        return [block for name, blocks in stacks for block in blocks[max(len(blocks) - counts.get(name, 0), 0) :]]

    def _embeddings(self) -> list[nn.Module]:
        names = () if self.swap is None else self.swap.embeddings
        return [getattr(self._model, name) for name in names if hasattr(self._model, name)]

    def _parts(self) -> list[nn.Module]:
        stacks = self._model.stacks()
        top = [module for name, module in self._model.named_children() if name not in stacks]
        return [*top, *(block for blocks in stacks.values() for block in blocks)]

    @contextmanager
    def swapping(self, device: torch.device) -> Iterator[None]:
        """Inside, the model brings waiting blocks to `device` around their turn."""
        if self.swap is None or device == self._offload:
            yield
            return
        swapper = Swapper(self.waiting_blocks(), device, self.swap)
        before, self._model.visit = self._model.visit, swapper.visit
        hooks = [hook for m in self._embeddings() for hook in _visit(m, device, self.swap.use_non_blocking)]
        try:
            yield
        finally:
            self._model.visit = before
            swapper.leave_all()
            for hook in hooks:
                hook.remove()


class Swapper:
    """Brings waiting blocks to the device for their turn, the next ones ahead of time on a stream of their own."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, args: BlockSwapArgs) -> None:
        self._blocks = blocks
        self._places = {id(block): place for place, block in enumerate(blocks)}
        self._device = device
        self._args = args
        self._here: dict[int, list[tuple[Tensor, Tensor]]] = {}
        ahead = args.prefetch_blocks > 0 and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if ahead else None

    @contextmanager
    def visit(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block's weights are on the device."""
        place = self._places.get(id(block))
        if place is None:
            yield
            return
        self._arrive(place)
        try:
            yield
        finally:
            self._leave(place)

    def leave_all(self) -> None:
        """After a run that stopped in the middle, too."""
        for place in list(self._here):
            self._leave(place)

    def _arrive(self, place: int) -> None:
        """That block is ready to run, and the blocks after it are on their way."""
        self._bring(place)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            for later in range(place + 1, min(place + 1 + self._args.prefetch_blocks, len(self._blocks))):
                self._bring(later)

    def _leave(self, place: int) -> None:
        """That block points at its waiting weights again."""
        for parameter, value in self._here.pop(place, ()):
            if self._stream is not None:
                # Made on the copy stream, read on this one: the memory is free only once this stream is done.
                parameter.data.record_stream(torch.cuda.current_stream(self._device))
            parameter.data = value

    def _bring(self, place: int) -> None:
        if place in self._here:
            return
        with torch.cuda.stream(self._stream):
            moved = _move(self._blocks[place], self._device, self._args.use_non_blocking)
        self._here[place] = moved
        if self._args.block_swap_debug:
            size = sum(value.nbytes for _, value in moved) / 2**20
            log.info("Waiting block %d: %.1f MB to the GPU.", place, size)


@contextmanager
def brought(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules' weights are on `device`; after it they are where they wait. Nothing is copied back."""
    waiting = [pair for module in modules for pair in _move(module, device, non_blocking=False)]
    try:
        yield
    finally:
        for parameter, value in waiting:
            parameter.data = value


def _visit(module: nn.Module, device: torch.device, non_blocking: bool) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks that bring the module to `device` for each of its forwards."""
    waiting: list[tuple[Tensor, Tensor]] = []

    def arrive(_: nn.Module, __: object) -> None:
        waiting.extend(_move(module, device, non_blocking))

    def leave(_: nn.Module, __: object, ___: object) -> None:
        for parameter, value in waiting:
            parameter.data = value
        waiting.clear()

    return module.register_forward_pre_hook(arrive), module.register_forward_hook(leave, always_call=True)


def _move(module: nn.Module, device: torch.device, non_blocking: bool) -> list[tuple[Tensor, Tensor]]:
    """Put the parameters on `device`; returns each with its waiting value."""
    waiting = [(parameter, parameter.data) for parameter in module.parameters()]
    for parameter, value in waiting:
        parameter.data = kernel_ready(value.to(device, non_blocking=non_blocking), strided=False)
    return waiting
