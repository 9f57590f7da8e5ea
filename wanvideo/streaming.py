"""A model of many blocks on a GPU that has no room for all of it: a block is there only while it runs.

For encoders, which run once a prompt, so that as many bytes are copied as if the whole model moved there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..host.residence import MAIN_MEMORY, Residence, tensors_of
from .device_copies import copies_for
from .memory import gigabytes

log = logging.getLogger("wanvideo")

# What an encoder computes with, besides its weights.
HEADROOM = 2**29


class Streamed:
    """Serves as the `place` of the host's memory management. blocks: of the module, which run one after the other."""

    def __init__(self, module: nn.Module, blocks: nn.ModuleList) -> None:
        self._module, self._blocks = module, blocks
        self._residence = Residence()
        # Where the blocks are brought for their turn; None where they are with the rest.
        self._turns: torch.device | None = None

    def __call__(self, device: torch.device) -> None:
        """To the device: all of it, or the rest where the blocks wait in main memory."""
        inside = {id(tensor) for tensor in tensors_of(self._blocks)}
        waits = device != MAIN_MEMORY and not self._fits(device)
        self._turns = device if waits else None
        if waits:
            self._residence.move(tensors_of(self._blocks), MAIN_MEMORY)
        moving = (tensor for tensor in tensors_of(self._module) if not (waits and id(tensor) in inside))
        self._residence.move(moving, device)

    def _fits(self, device: torch.device) -> bool:
        copies = copies_for(device)
        if not copies.measures:
            return True
        if device.index is None:
            device = torch.empty(0, device=device).device
        away = sum(tensor.nbytes for tensor in tensors_of(self._module) if tensor.device != device)
        free = copies.free()
        if not away or away + HEADROOM <= free:
            return True
        log.info(
            "%s takes %s and %s of GPU memory are free: its blocks go there one at a time.",
            type(self._module).__name__, gigabytes(away), gigabytes(free),
        )  # fmt: skip
        return False

    @contextmanager
    def turns(self) -> Iterator[None]:
        """Inside, blocks that wait come to the device while they run. Nothing is copied back."""
        if self._turns is None:
            yield
            return
        with ExitStack() as leaving:
            # An interruption may leave a block there: torch calls no hook behind it then.
            leaving.callback(self._residence.move, tensors_of(self._blocks), MAIN_MEMORY)
            for block in self._blocks:
                leaving.callback(block.register_forward_pre_hook(self._bring).remove)
                leaving.callback(block.register_forward_hook(self._take_back).remove)
            yield

    def _bring(self, block: nn.Module, _: object) -> None:
        self._residence.move(tensors_of(block), self._turns)

    def _take_back(self, block: nn.Module, *_: object) -> None:
        self._residence.move(tensors_of(block), MAIN_MEMORY)
