"""A model of a system's own that runs beside the transformer, in turn with its blocks.

Where memory is short its parts wait as the transformer's blocks do: pinned in main memory, each copied to the device
while something else runs, through two slabs of its own there. Its order of turns never changes, and its slabs are
small: sharing the transformer's would let a wide block arrive late for every narrow one between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..host.residence import Residence, tensors_of
from ..tensor_layout import kernel_ready
from .device_copies import Copies, copies_for
from .host_slabs import Unit, warn_of_pageable
from .memory import SLABS, slab_bytes
from .swapper import Swapper


@contextmanager
def brought(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules' weights are on `device`; after it they are where they wait. Nothing is copied back."""
    waiting = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    try:
        for parameter, value in waiting:
            parameter.data = kernel_ready(value.to(device), strided=False)
        yield
    finally:
        for parameter, value in waiting:
            parameter.data = value


class InTurns(nn.Module):
    """Base of such models."""

    def turns(self) -> Sequence[Sequence[nn.Module]]:
        """The parts that run in each turn, in order: all of the model, each part once."""
        raise NotImplementedError(f"{type(self).__name__} does not say what runs in its turns.")

    def quantizable(self, name: str) -> bool:
        """Whether the linear layer of this name may be quantized."""
        return False


class Turns:
    """Where such a model is. Serves as the `place` of the host's memory management.

    streamed: whether its parts come to the device for their turn; otherwise the model is there as a whole. copies_for:
    how bytes reach a device.
    """

    def __init__(self, module: InTurns, offload: torch.device) -> None:
        self.streamed = False
        self.copies_for: Callable[[torch.device], Copies] = copies_for
        self._module, self._offload = module, offload
        self._units = [Unit(nn.ModuleList(parts)) for parts in module.turns()]
        self._residence = Residence()
        self._swapper: Swapper | None = None
        self._told = False

    def __call__(self, device: torch.device) -> None:
        """To the device, as a whole or by slabs; to the offload device, with nothing pinned."""
        self._stop()
        streams = self.streamed and device != self._offload
        self._residence.move(tensors_of(self._module), self._offload if streams else device)
        if streams:
            try:
                self._start(self.copies_for(device))
            except BaseException:
                self._stop()
                raise

    def _start(self, copies: Copies) -> None:
        for unit in self._units:
            unit.gather(copies)
        self._told = self._told or warn_of_pageable(self._units)
        self._swapper = Swapper(self._units, copies)

    def _stop(self) -> None:
        if self._swapper is not None:
            self._swapper.close()
            self._swapper = None
        for unit in self._units:
            unit.release()

    def resident_bytes(self) -> int:
        """What it takes of the device for as long as it is held there."""
        if self.streamed:
            return SLABS * max(slab_bytes(unit.tensors()) for unit in self._units)
        return sum(tensor.nbytes for tensor in tensors_of(self._module))

    @contextmanager
    def visit(self, turn: int, device: torch.device) -> Iterator[None]:
        """Inside, the parts of this turn are on `device`, even where the host moved the model out for a larger one."""
        part = self._units[turn].module
        with brought((part,), device) if self._swapper is None else self._swapper.visit(part):
            yield
