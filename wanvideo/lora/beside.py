"""LoRAs that run beside the weights, which stay as they are to the bit.

A layer gets slots: parameters of its own, so that they move with it under block swap, and for the time being a class
with the slots in its forward (as torch.nn.utils.parametrize and FSDP2 do). torch.compile guards a module's class, but
not its hooks, so that compiled blocks are right in every order of runs and each set of slots compiles once. Strengths
are data: tensors that all layers of one make share, filled before a step.

Shapes: M rows of input, K and N features, R the ranks of all files together (and zeros up to a multiple of 8, which
gives the products rows of 16 bytes), F files.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.fp8_rows import ROWS_DTYPE, Fp8Rows, padded_size, quantize
from ...quantized.fp8 import quantize_rows, rows_product
from ...quantized.linear import QuantizedLinear, frozen, padded, weight_shape
from .file import LoraFile
from .kinds import Change, Pair
from .reading import read_lora

log = logging.getLogger("wanvideo")

RANK_MULTIPLE = 8
# Of each model the files that ran last, so that the windows of a long video read them once.
_last_read: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], dict[str, list[Change]]]] = WeakKeyDictionary()


class Entry(NamedTuple):
    """A stretch of a slot: which file's it is (None for zeros), its factor, and how many ranks it takes."""

    file: int | None
    factor: float
    count: int


class Beside:
    """Unmerged LoRAs at work. Strengths change between forwards; nothing waits for the device."""

    def __init__(self, files: Sequence[LoraFile], device: torch.device) -> None:
        self._files = files
        self._device = device
        self._scales: dict[tuple[Entry, ...], Tensor] = {}
        self._now = tuple(file.at(0) for file in files)

    def scale(self, entries: Sequence[Entry]) -> Tensor:
        """float32, one value for each rank of the entries: strength * factor. Layers that are alike share it."""
        entries = tuple(entries)
        if entries not in self._scales:
            self._scales[entries] = self._values(entries).to(self._device)
        return self._scales[entries]

    def set_step(self, step: int, *, filled: bool = True) -> None:
        """Strengths of this step, counted from 0. filled: whether what control LoRAs read holds anything in it."""
        wanted = tuple(file.at(step) if filled or not file.widens else 0.0 for file in self._files)
        if wanted == self._now:
            return
        self._now = wanted
        for entries, scale in self._scales.items():
            scale.copy_(self._values(entries))

    def _values(self, entries: Sequence[Entry]) -> Tensor:
        each = [(0.0 if e.file is None else self._now[e.file] * e.factor, e.count) for e in entries]
        return torch.tensor([value for value, count in each for _ in range(count)], dtype=torch.float32)


@contextmanager
def beside(model: nn.Module, files: Sequence[LoraFile], device: torch.device, dtype: torch.dtype) -> Iterator[Beside]:
    """Inside, the unmerged LoRAs work on `device`, with products in `dtype`; afterwards the model is as it was.

    Enter it outside of block swap, which moves the slots with their layers. Raises ValueError for a file that does not
    fit the model.
    """
    state = Beside(files, device)
    changes: dict[str, list[tuple[int, Change]]] = {}
    for index, read in enumerate(_changes_of(model, files)):
        for name, found in read.items():
            changes.setdefault(name, []).extend((index, change) for change in found)
    slots, modules = _Slots(state, dtype), dict(model.named_modules())
    try:
        with torch.no_grad():
            for name, found in changes.items():
                slots.attach(modules, name, found)
        if slots.dense:
            log.info(
                "LoRAs beside the model hold %.2f GB of full differences; merge_loras saves that.", slots.dense / 1e9
            )
        yield state
    finally:
        slots.detach()


def _changes_of(model: nn.Module, files: Sequence[LoraFile]) -> list[dict[str, list[Change]]]:
    """What each file changes, read again only where a file or the choice of its layers is another than last time."""
    before, keys = _last_read.get(model, {}), [_identity(file) for file in files]
    now: dict[tuple[object, ...], dict[str, list[Change]]] = {}
    for key, file in zip(keys, files, strict=True):
        if key not in now:
            now[key] = before[key] if key in before else read_lora(file, model).changes
    _last_read[model] = now
    return [now[key] for key in keys]


def _identity(file: LoraFile) -> tuple[object, ...]:
    stat = os.stat(file.path)
    return file.path, stat.st_mtime_ns, stat.st_size, file.blocks, file.skip_layers, file.claimed


class _Slots:
    """Attaches slots to modules and takes them off again. dense: bytes of full differences."""

    def __init__(self, state: Beside, dtype: torch.dtype) -> None:
        self.dense = 0
        self._state = state
        self._dtype = dtype
        self._changed: dict[nn.Module, type[nn.Module]] = {}
        self._names: list[tuple[nn.Module, str]] = []

    def attach(self, modules: Mapping[str, nn.Module], name: str, changes: Sequence[tuple[int, Change]]) -> None:
        """Give the layer, or the module of the parameter, of this name what it needs for these changes by file."""
        module = modules.get(name)
        if isinstance(module, nn.Linear | nn.Conv3d):
            self._attach_layer(module, changes)
            return
        leaf = "weight"
        if module is None:
            owner, _, leaf = name.rpartition(".")
            module = modules[owner]
        for parameter in (leaf, "bias"):
            self._attach_parameter(module, parameter, changes)

    def detach(self) -> None:
        """Every module as it was."""
        for module, kind in self._changed.items():
            module.__class__ = kind
        for module, name in self._names:
            delattr(module, name)

    def _put(self, module: nn.Module, name: str, value: Tensor, entries: Sequence[Entry]) -> None:
        """A slot, where the module's weights are, and its scale, which stays on the device that computes."""
        device = next(module.parameters()).device
        setattr(module, name, frozen(value.to(device)))
        setattr(module, f"{name}_scale", self._state.scale(entries))
        self._names += [(module, name), (module, f"{name}_scale")]

    def _change_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self._changed.setdefault(module, type(module))
        module.__class__ = kind

    def _attach_parameter(self, module: nn.Module, name: str, changes: Sequence[tuple[int, Change]]) -> None:
        parameter = module._parameters.get(name)
        values = []
        for index, change in changes:
            if name == "bias" and change.bias is not None:
                values.append((index, change.bias))
            elif name != "bias" and change.deltas:
                values.append((index, change.weight(parameter.shape, lambda: parameter)))
        if values:
            stacked = torch.stack([value.float().reshape(parameter.shape) for _, value in values])
            self._put(module, f"lora_{name}", stacked, [Entry(index, 1.0, 1) for index, _ in values])
            self._change_class(module, _with_parameter(type(module), name))

    def _attach_layer(self, layer: nn.Module, changes: Sequence[tuple[int, Change]]) -> None:
        shape = weight_shape(layer)
        dtype = self._dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype
        pairs: list[tuple[int, Pair]] = []
        gains, dense, biases = [], [], []
        for index, change in changes:
            if change.bias is not None:
                biases.append((index, change.bias))
            if not change.deltas:
                continue
            if len(shape) > 2 or not all(isinstance(delta, Pair) for delta in change.deltas):
                dense.append((index, change.weight(shape, lambda: _values(layer).cpu())))
            elif change.magnitude is None:
                pairs += [(index, delta) for delta in change.deltas]
            elif change.magnitude.rows:
                gain = self._gain(layer, change)
                gains.append((index, gain.flatten() - 1))
                pairs += [(index, delta._replace(up=gain * delta.up.float())) for delta in change.deltas]
            else:
                dense.append((index, change.weight(shape, lambda: _values(layer).cpu())))
        if pairs:
            self._put_pairs(layer, pairs, dtype)
        for name, values, kind in (("gain", gains, torch.float32), ("bias", biases, torch.float32),
                                   ("dense", dense, dtype)):  # fmt: skip
            if values:
                stacked = torch.stack([value.to(kind) for _, value in values])
                self._put(layer, f"lora_{name}", stacked, [Entry(index, 1.0, 1) for index, _ in values])
                self.dense += stacked.nbytes if name == "dense" else 0
        self._change_class(layer, _with_slots(type(layer)))

    def _gain(self, layer: nn.Module, change: Change) -> Tensor:
        base = _values(layer)
        total = base + change.delta(base.shape).to(base.device)
        return change.magnitude.gain(base, total).cpu()

    def _put_pairs(self, layer: nn.Linear, pairs: Sequence[tuple[int, Pair]], dtype: torch.dtype) -> None:
        entries = [Entry(index, pair.factor, pair.down.shape[0]) for index, pair in pairs]
        ranks = sum(entry.count for entry in entries)
        spare = padded_size(ranks, RANK_MULTIPLE) - ranks
        if spare:
            entries.append(Entry(None, 0.0, spare))
        down = F.pad(torch.cat([pair.down.float() for _, pair in pairs]), (0, 0, 0, spare))
        up = F.pad(torch.cat([pair.up.float() for _, pair in pairs], dim=1), (0, spare))
        if getattr(layer, "takes_rows", False):
            # FP8 products want FP8 operands. Two of them, the second what the first one's rounding left, are as
            # precise as bfloat16 is, and cost no copy of the activation in base precision.
            halves, scales = zip(*_in_two(down), strict=True)
            width = padded_size(down.shape[1])
            entries, down, up = entries * 2, torch.cat([padded(h, h.shape[0], width) for h in halves]), up.repeat(1, 2)
            layer.lora_down_rows = frozen(torch.cat(scales).to(next(layer.parameters()).device))
            self._names.append((layer, "lora_down_rows"))
        else:
            down = down.to(dtype)
        self._put(layer, "lora_down", down, entries)
        self._put(layer, "lora_up", up.to(dtype), entries)


def _values(layer: nn.Module) -> Tensor:
    """The weight of a layer in any storage, float32 in its shape."""
    return layer.expanded(torch.float32) if isinstance(layer, QuantizedLinear) else layer.weight.float()


def _in_two(t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A matrix as the sum of two in FP8: values, and scales of their rows."""
    for _ in range(2):
        values, scale = quantize_rows(t, ROWS_DTYPE)
        yield values, scale
        t = t - values.float() * scale


@functools.cache
def _with_parameter(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """A module whose parameter `name` is its stored value plus scale * the slot, rounded once."""

    def changed(self: nn.Module) -> Tensor:
        value = self._parameters[name]
        difference = torch.tensordot(getattr(self, f"lora_{name}_scale"), self._parameters[f"lora_{name}"], 1)
        return (value.float() + difference).to(value.dtype)

    return type(f"{kind.__name__}WithLora", (kind,), {name: property(changed)})


@functools.cache
def _with_slots(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer that adds its slots to what its kind computes."""

    def forward(self: nn.Module, x: Tensor | Fp8Rows) -> Tensor:
        if isinstance(x, Tensor) and getattr(self, "takes_rows", False):
            x = quantize(x)
        return _added(self, x, kind.forward(self, x))

    return type(f"{kind.__name__}WithLora", (kind,), {"forward": forward})


def _added(layer: nn.Module, x: Tensor | Fp8Rows, y: Tensor) -> Tensor:
    """y plus what the layer's slots make of x, in y's dtype."""
    slots = layer._parameters
    channels = (-1, *(1,) * (len(weight_shape(layer)) - 2))
    if "lora_gain" in slots:
        product = y if layer.bias is None else y - layer.bias.view(channels).to(y.dtype)
        y = y + (product * (layer.lora_gain_scale @ slots["lora_gain"])).to(y.dtype)
    if "lora_down" in slots:
        y = _with_pairs(layer, x, y)
    if "lora_dense" in slots:
        wide = x.to(slots["lora_dense"].dtype)
        for scale, weight in zip(layer.lora_dense_scale, slots["lora_dense"], strict=True):
            y = y + (scale * _product(layer, wide, weight)).to(y.dtype)
    if "lora_bias" in slots:
        y = y + (layer.lora_bias_scale @ slots["lora_bias"]).view(channels).to(y.dtype)
    return y


def _with_pairs(layer: nn.Module, x: Tensor | Fp8Rows, y: Tensor) -> Tensor:
    down, up = layer.lora_down, layer.lora_up
    if isinstance(x, Fp8Rows):
        small = rows_product(x, down, layer.lora_down_rows, None, down.shape[0])
    else:
        small = F.linear(x.to(down.dtype), down)
    small = (small * layer.lora_down_scale).to(up.dtype).reshape(-1, up.shape[1])
    # y is this layer's own new tensor. Adding in the product's epilogue saves a pass over it, and a rounding.
    flat = y.reshape(-1, up.shape[0])
    if flat.dtype == up.dtype:
        flat.addmm_(small, up.t())
    else:
        flat.add_(small @ up.t())
    return flat.view(y.shape)


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv3d):
        return F.conv3d(x, weight, stride=layer.stride)
    return F.linear(x, weight)
