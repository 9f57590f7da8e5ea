"""Block swap: blocks that wait in main memory and are on the device only while they run.

Weights are read only, so nothing is ever copied back: leaving the device means pointing at the waiting copy again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..tensor_layout import kernel_ready

if TYPE_CHECKING:
    from .modules.model import WanModel

log = logging.getLogger("wanvideo")


@dataclass(frozen=True, kw_only=True)
class BlockSwapArgs:
    """Settings of WanVideoBlockSwap (socket BLOCKSWAPARGS).

    blocks_to_swap: blocks that wait; prefetch_blocks: how many are brought ahead of time; block_swap_debug: log each.
    vace_blocks_to_swap: of VACE models, which this version refuses to load.
    """

    blocks_to_swap: int = 20
    offload_img_emb: bool = False
    offload_txt_emb: bool = False
    use_non_blocking: bool = False
    vace_blocks_to_swap: int = 0
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
        waiting = [*self.units().values(), tuple(self._embeddings())] if device != self._offload else []
        held = {id(module) for modules in waiting for module in modules}
        for module in self._parts():
            module.to(self._offload if id(module) in held else device)

    def units(self) -> dict[int, tuple[nn.Module, ...]]:
        """Modules of each block that waits: the last `blocks_to_swap` ones, with what travels with them."""
        if self.swap is None:
            return {}
        count = len(self._model.blocks)
        first = max(count - self.swap.blocks_to_swap, 0)
        return {index: self._unit(index) for index in range(first, count)}

    def _embeddings(self) -> list[nn.Module]:
        """Embeddings that wait too."""
        chosen = []
        if self.swap is not None and self.swap.offload_txt_emb:
            chosen.append(self._model.text_embedding)
        if self.swap is not None and self.swap.offload_img_emb and hasattr(self._model, "img_emb"):
            chosen.append(self._model.img_emb)
        return chosen

    def _unit(self, index: int) -> tuple[nn.Module, ...]:
        travellers = [m for e in self._model.extensions for m in e.travels_with(self._model, index)]
        return self._model.blocks[index], *travellers

    def _parts(self) -> list[nn.Module]:
        travellers = [m for i in range(len(self._model.blocks)) for m in self._unit(i)]
        inside = {id(m) for m in travellers}
        top = [m for name, m in self._model.named_children() if name != "blocks" and id(m) not in inside]
        return [*top, *travellers]

    @contextmanager
    def swapping(self, device: torch.device) -> Iterator[None]:
        """Inside, the model brings waiting blocks to `device` around their turn."""
        if self.swap is None or device == self._offload:
            yield
            return
        swapper = Swapper(self.units(), device, self.swap)

        @contextmanager
        def around(index: int) -> Iterator[None]:
            swapper.arrive(index)
            try:
                yield
            finally:
                swapper.leave(index)

        before = self._model.around_block
        self._model.around_block = around
        hooks = [hook for m in self._embeddings() for hook in _visit(m, device, self.swap.use_non_blocking)]
        try:
            yield
        finally:
            self._model.around_block = before
            swapper.leave_all()
            for hook in hooks:
                hook.remove()


class Swapper:
    """Brings waiting units to the device for their turn, the next ones ahead of time on a stream of their own."""

    def __init__(self, units: dict[int, tuple[nn.Module, ...]], device: torch.device, args: BlockSwapArgs) -> None:
        self._units = units
        self._device = device
        self._args = args
        self._here: dict[int, list[tuple[Tensor, Tensor]]] = {}
        ahead = args.prefetch_blocks > 0 and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if ahead else None

    def arrive(self, index: int) -> None:
        """Unit `index` is ready to run, and the units after it are on their way."""
        self._bring(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            for later in range(index + 1, index + 1 + self._args.prefetch_blocks):
                self._bring(later)

    def leave(self, index: int) -> None:
        """Unit `index` points at its waiting weights again."""
        for parameter, value in self._here.pop(index, ()):
            if self._stream is not None:
                # Made on the copy stream, read on this one: the memory is free only once this stream is done.
                parameter.data.record_stream(torch.cuda.current_stream(self._device))
            parameter.data = value

    def leave_all(self) -> None:
        """After a run that stopped in the middle, too."""
        for index in list(self._here):
            self.leave(index)

    def _bring(self, index: int) -> None:
        if index in self._here or index not in self._units:
            return
        with torch.cuda.stream(self._stream):
            moved = _move(self._units[index], self._device, self._args.use_non_blocking)
        self._here[index] = moved
        if self._args.block_swap_debug:
            size = sum(value.nbytes for _, value in moved) / 2**20
            log.info("Block %d: %.1f MB to the GPU.", index, size)


def _visit(module: nn.Module, device: torch.device, non_blocking: bool) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks that bring the module to `device` for each of its forwards."""
    waiting: list[tuple[Tensor, Tensor]] = []

    def arrive(_: nn.Module, __: object) -> None:
        waiting.extend(_move((module,), device, non_blocking))

    def leave(_: nn.Module, __: object, ___: object) -> None:
        for parameter, value in waiting:
            parameter.data = value
        waiting.clear()

    return module.register_forward_pre_hook(arrive), module.register_forward_hook(leave, always_call=True)


def _move(modules: tuple[nn.Module, ...], device: torch.device, non_blocking: bool) -> list[tuple[Tensor, Tensor]]:
    """Put the parameters on `device`; returns each with its waiting value."""
    waiting = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    for parameter, value in waiting:
        parameter.data = kernel_ready(value.to(device, non_blocking=non_blocking), strided=False)
    return waiting
