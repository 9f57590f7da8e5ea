"""LoRAs that become part of the weights.

The differences of all files are summed in float32 and added before a weight is rounded, so that it is rounded once:
quantising twice costs 3 dB.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..quantized.linear import QuantisedLinear
from .lora import Change, LoraFile, changes_for, differences, parameter_shapes


class MergedLoras:
    """What the files change in a model, by layer; the model's weights may still be on the meta device.

    Raises ValueError for a LoRA that does not fit, or whose strength changes by the step.
    """

    def __init__(self, files: Sequence[LoraFile], model: nn.Module) -> None:
        self._shapes = parameter_shapes(model)
        self._changes: dict[str, list[tuple[float, Change]]] = {}
        for file in files:
            if not isinstance(file.strength, float | int):
                raise ValueError(
                    f"The LoRA {file.path.name} has a strength for every step, so it cannot be merged: turn "
                    "merge_loras off."
                )
            for name, change in changes_for(file, model).items():
                self._changes.setdefault(name, []).append((file.strength, change))

    def weight(self, layer: str) -> Tensor | None:
        """What is added to the layer's weight, float32 [N, K] on the CPU; None for nothing."""
        changes = [(s, c._replace(diff_b=None)) for s, c in self._changes.get(layer, ())]
        return self._totals(layer, changes).get(f"{layer}.weight")

    def add_to_others(self, model: nn.Module) -> None:
        """Add to all parameters but weights of quantised layers, which were made with their differences."""
        layers = dict(model.named_modules())
        for name, changes in self._changes.items():
            if isinstance(layers.get(name), QuantisedLinear):
                changes = [(s, c._replace(down=None, up=None, diff=None)) for s, c in changes]
            for target, difference in self._totals(name, changes).items():
                parameter = model.get_parameter(target)
                parameter.data = (parameter.float() + difference).to(parameter.dtype)

    def _totals(self, layer: str, changes: Sequence[tuple[float, Change]]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for strength, change in changes:
            for target, difference in differences(layer, change, self._shapes):
                difference = strength * difference
                totals[target] = difference if target not in totals else totals[target].add_(difference)
        return totals
