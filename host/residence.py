"""Where weights are.

They are read only, so that leaving a device costs nothing: their memory outside it is still there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger("wanvideo")

# Pinned memory that a copy goes through. Smaller tensors gain nothing by it.
PIECE = 64 * 2**20
WORTH_STAGING = 2**20
MAIN_MEMORY = torch.device("cpu")


class Copied(NamedTuple):
    """Of a tensor on a device: its memory outside, and what tells whether the tensor has been changed since."""

    home: Tensor
    address: int
    version: int


class Residence:
    """Moves weights between main memory and devices, each time the same tensors with other memory.

    What a tensor had in main memory stays while it is on a device: the mapped file, or the one copy that a module
    converted at load has, for which there must be room anyway once it leaves. A tensor that was made on the device or
    changed there is copied back.
    """

    def __init__(self) -> None:
        self._copied: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @torch.no_grad()
    def move(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """All of them to `device`; those that are there already stay as they are."""
        if device == MAIN_MEMORY:
            for tensor in tensors:
                self._go_home(tensor)
            return
        if device.index is None:
            device = torch.empty(0, device=device).device
        away = [tensor for tensor in tensors if tensor.device != device]
        with Staging(away, device) as staging:
            for tensor in away:
                home = tensor.data
                tensor.data = staging.copy(home)
                if home.device == MAIN_MEMORY:
                    self._copied[tensor] = Copied(home, tensor.data_ptr(), tensor._version)

    def forget(self) -> None:
        """Let main memory go: what is on a device will be copied back when it leaves."""
        self._copied.clear()

    def _go_home(self, tensor: Tensor) -> None:
        copied = self._copied.pop(tensor, None)
        if copied is not None and (tensor.data_ptr(), tensor._version) == (copied.address, copied.version):
            tensor.data = copied.home
        else:
            tensor.data = tensor.data.to(MAIN_MEMORY)


class ModuleResidence:
    """A module as a whole, as the `place` of a host's memory management."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._residence = module, Residence()

    def __call__(self, device: torch.device) -> None:
        """Its parameters and buffers to `device`."""
        self._residence.move(tensors_of(self._module), device)


class Staging:
    """Copies to a device. Large ones go to a GPU through two pieces of pinned memory, one filled while one is read.

    From pageable memory the driver copies with one thread and waits; this takes about a quarter of the time.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._device = device
        self._pieces: list[tuple[Tensor, torch.cuda.Event]] = []
        self._staged = device.type == "cuda" and any(map(_is_staged, tensors))

    def __enter__(self) -> Staging:
        if self._staged:
            try:
                pinned = torch.empty(2, PIECE, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                log.info("The system refuses to pin memory, so that weights go to the GPU more slowly.")
            else:
                self._pieces = [(piece, torch.cuda.Event()) for piece in pinned]
        return self

    def __exit__(self, *failure: object) -> None:
        # Whoever gets this memory next may write to it at once.
        for _, read in self._pieces:
            read.synchronize()

    def copy(self, source: Tensor) -> Tensor:
        """The same values on the device."""
        if not self._pieces or not _is_staged(source):
            return source.to(self._device)
        target = torch.empty_like(source, device=self._device)
        parts = zip(_octets(target).split(PIECE), _octets(source).split(PIECE), strict=True)
        for there, here in parts:
            self._pieces.reverse()
            piece, read = self._pieces[0]
            read.synchronize()
            there.copy_(piece[: here.numel()].copy_(here), non_blocking=True)
            read.record(torch.cuda.current_stream(self._device))
        return target


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _is_staged(tensor: Tensor) -> bool:
    return (
        tensor.device == MAIN_MEMORY
        and tensor.nbytes >= WORTH_STAGING
        and tensor.is_contiguous()
        and not tensor.is_pinned()
    )


def _octets(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
