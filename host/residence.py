"""Where weights are.

They are read only, so that leaving a device costs nothing: their memory outside it is still there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .staging import MAIN_MEMORY, Staging


class Copied(NamedTuple):
    """Of a tensor on a device: its memory outside, and what it would still be if nobody had changed it."""

    home: Tensor
    state: tuple[int, int | None]


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
        away = _away(tensors, device)
        with Staging(away, device) as staging:
            for tensor in away:
                self._point(tensor, staging.copy(tensor.data))

    @torch.no_grad()
    def place(self, tensors: Iterable[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Give those that are in main memory memory on `device`, whose values the (target, source) pairs are to bring.

        Until these have done so, `move` to main memory undoes it, also behind an error.
        """
        pairs = []
        for tensor in _away(tensors, device):
            if tensor.device == MAIN_MEMORY:
                pairs.append((torch.empty_like(tensor.data, device=device), tensor.data))
                self._point(tensor, pairs[-1][0])
        return pairs

    def _point(self, tensor: Tensor, target: Tensor) -> None:
        home, tensor.data = tensor.data, target
        if home.device == MAIN_MEMORY:
            self._copied[tensor] = Copied(home, _state(tensor))

    def forget(self) -> None:
        """Let main memory go: what is on a device will be copied back when it leaves."""
        self._copied.clear()

    def _go_home(self, tensor: Tensor) -> None:
        copied = self._copied.pop(tensor, None)
        if copied is not None and _state(tensor) == copied.state:
            tensor.data = copied.home
        else:
            tensor.data = tensor.data.to(MAIN_MEMORY)


def _state(tensor: Tensor) -> tuple[int, int | None]:
    """Address, and changes in place, which torch does not count for tensors of inference mode: ComfyUI's weights."""
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:
        # `is_inference` does not tell: it goes by the memory that the tensor has now.
        return tensor.data_ptr(), None


def _away(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    if device.index is None:
        device = torch.empty(0, device=device).device
    return [tensor for tensor in tensors if tensor.device != device]


class ModuleResidence:
    """A module as a whole, as the `place` of a host's memory management."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._residence = module, Residence()

    def __call__(self, device: torch.device) -> None:
        """Its parameters and buffers to `device`."""
        self._residence.move(tensors_of(self._module), device)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
