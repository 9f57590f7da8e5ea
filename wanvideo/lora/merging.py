"""LoRAs that become part of the weights.

The differences of all files are summed in float32 and added to the file's own value before a weight is rounded, so that
it is rounded once: quantizing twice costs 3 dB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...quantized.linear import QuantizedLinear
from ..assign import read
from ..checkpoint import Checkpoint
from .file import LoraFile
from .kinds import Change
from .reading import read_lora, targets_of


class MergedLoras:
    """What the files change in a model that is filled from `checkpoint` and may still be on the meta device.

    Raises ValueError for a LoRA that does not fit, or whose strength changes by the step.
    """

    def __init__(self, files: Sequence[LoraFile], model: nn.Module, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shapes = {name: target.shape for name, target in targets_of(model).items()} if files else {}
        self._changes: dict[str, list[tuple[float, Change]]] = {}
        for file in files:
            if not isinstance(file.strength, float | int):
                raise ValueError(
                    f"The LoRA {file.path.name} has a strength for every step, so it cannot be merged: turn "
                    "merge_loras off."
                )
            for name, changes in read_lora(file, model).changes.items():
                self._changes.setdefault(name, []).extend((file.strength, change) for change in changes)

    def weight(self, layer: str) -> Tensor | None:
        """What is added to the layer's weight, float32 [N, K] on the CPU; None for nothing."""
        return self._total(layer, f"{layer}.weight")

    def add_to_others(self, model: nn.Module) -> None:
        """Add to all parameters but weights of quantized layers, which were made with their differences."""
        layers = dict(model.named_modules())
        for name, changes in self._changes.items():
            parameter = f"{name}.weight" if name in layers else name
            if not isinstance(layers.get(name), QuantizedLinear):
                self._add(model, parameter, self._total(name, parameter))
            biases = [strength * change.bias for strength, change in changes if change.bias is not None]
            self._add(model, f"{name}.bias", sum(biases) if biases else None)

    def _total(self, name: str, parameter: str) -> Tensor | None:
        changes = [(strength, change) for strength, change in self._changes.get(name, ()) if change.deltas]
        if not changes:
            return None
        shape = self._shapes[name]
        total = torch.zeros(shape)
        for strength, change in changes:
            total.add_(change.weight(shape, lambda: self._stored(parameter, shape)), alpha=strength)
        return total

    def _add(self, model: nn.Module, name: str, difference: Tensor | None) -> None:
        if difference is not None:
            parameter = model.get_parameter(name)
            value = self._stored(name, parameter.shape) + difference.reshape(parameter.shape)
            parameter.data = value.to(parameter.dtype)

    def _stored(self, name: str, shape: torch.Size) -> Tensor:
        """The file's value in float32."""
        return read(self._checkpoint, name, shape).float()
