"""LoRA: low-rank changes of linear layers, merged into the weights or run beside them.

Source: Hu et al. 2021; key names of Kijai's, ComfyUI's, diffusers', PEFT's and kohya's files are facts.
A change is strength * (alpha / rank) * up @ down, or a full difference (`diff`, `diff_b` of the bias, `diff_m` of the
modulation).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantized.linear import QuantisedLinear, weight_shape
from .checkpoint import Checkpoint, open_checkpoint
from .key_names import from_diffusers

log = logging.getLogger("wanvideo")

# What unmerged LoRAs change in a model, kept as long as the model: a long video attaches them anew at every window.
_attached: WeakKeyDictionary[nn.Module, dict[LoraFile, dict[str, Change]]] = WeakKeyDictionary()

PREFIXES = (
    "base_model.model.", "diffusion_model.", "diffusion.model.", "transformer.", "pipe.dit.", "model.",
)  # fmt: skip
PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff",
}
MODULATION = "diff_m"
KOHYA = "lora_unet__"
KOHYA_LAYERS = {
    "self_attn_": "self_attn.", "cross_attn_": "cross_attn.", "ffn_": "ffn.", "time_embedding_": "time_embedding.",
    "text_embedding_": "text_embedding.", "time_projection_": "time_projection.", "img_emb_proj_": "img_emb.proj.",
    "head_head": "head.head", "patch_embedding": "patch_embedding",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """One LoRA of a WanVideoLoraSelect (socket WANVIDLORA, a tuple of these).

    strength: one number, or one a step (then it cannot be merged). blocks: names such as "blocks.3." that are used, an
    empty tuple for all; layers outside blocks always are. merge: into the weights at load, else beside them.
    """

    path: Path
    strength: float | tuple[float, ...] = 1.0
    blocks: tuple[str, ...] = ()
    skip_layers: tuple[str, ...] = ()
    merge: bool = True

    def at(self, step: int) -> float:
        """Strength at a step; a list that is too short goes on with its last value."""
        if isinstance(self.strength, float | int):
            return float(self.strength)
        return float(self.strength[min(step, len(self.strength) - 1)])

    def uses(self, layer: str) -> bool:
        """Whether this layer's change is wanted."""
        if any(part and part in layer for part in self.skip_layers):
            return False
        return not (self.blocks and layer.startswith("blocks.")) or layer.startswith(self.blocks)


class Change(NamedTuple):
    """What a LoRA does to one layer, in float32 on the CPU: factor * up @ down, differences of weight and bias."""

    down: Tensor | None
    up: Tensor | None
    factor: float
    diff: Tensor | None
    diff_b: Tensor | None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can take it."""
        size, rows = math.prod(shape), shape[0]
        if self.down is None:
            return self.diff is None or self.diff.numel() == size
        return self.up.shape[0] == rows and rows * self.down[0].numel() == size

    def weight(self, shape: Sequence[int]) -> Tensor | None:
        """The change of a weight of this shape, None where only the bias changes."""
        total = None if self.diff is None else self.diff.float().reshape(shape)
        if self.down is not None:
            product = self.factor * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(shape)
            total = product if total is None else total + product
        return total


def canonical_layer(key: str) -> tuple[str, str] | None:
    """A LoRA key -> (canonical layer name, part), or None if it is no part of a change."""
    key = key.replace(".default.", ".")
    part = next((p for p in sorted(PARTS, key=len, reverse=True) if key.endswith("." + p)), None)
    if part is None:
        return None
    layer = key.removesuffix("." + part)
    if layer.startswith(KOHYA):
        return _kohya_layer(layer.removeprefix(KOHYA)), PARTS[part]
    stripped = True
    while stripped:
        prefix = next((p for p in PREFIXES if layer.startswith(p)), None)
        stripped = prefix is not None
        layer = layer.removeprefix(prefix or "")
    layer = from_diffusers(layer)
    return (f"{layer}.modulation", "diff") if part == MODULATION else (layer, PARTS[part])


def _kohya_layer(name: str) -> str:
    block = re.match(r"blocks_(\d+)_(.+)$", name)
    front, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
    for old, new in KOHYA_LAYERS.items():
        if rest.startswith(old):
            return front + new + rest.removeprefix(old)
    return front + rest


def read_changes(file: LoraFile) -> dict[str, Change]:
    """Every wanted layer's change, by canonical name."""
    checkpoint = open_checkpoint(file.path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key in checkpoint.shapes:
        found = canonical_layer(key)
        if found is not None and file.uses(found[0]):
            parts.setdefault(found[0], {})[found[1]] = checkpoint.tensor(key)
    stabilised = any(key.startswith("base_model.model.") for key in checkpoint.shapes)
    return {layer: _change(layer, found, checkpoint, stabilised) for layer, found in parts.items()}


def _change(layer: str, parts: Mapping[str, Tensor], checkpoint: Checkpoint, stabilised: bool) -> Change:
    down, up = parts.get("down"), parts.get("up")
    if (down is None) != (up is None):
        raise ValueError(f"{checkpoint.path.name}: layer '{layer}' has only one half of its LoRA; download it again.")
    factor = 1.0
    if down is not None:
        rank = down.shape[0]
        alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
        # PEFT's rank-stabilised files leave alpha out: their factor is sqrt(rank), rounded as ComfyUI does.
        default = (rank * rank // int(rank**0.5)) / rank if stabilised else 1.0
        factor = alpha / rank if alpha else default
    return Change(down, up, factor, parts.get("diff"), parts.get("diff_b"))


def changes_for(file: LoraFile, model: nn.Module) -> dict[str, Change]:
    """The changes that fit layers, or parameters outside layers, of `model`; logs how many did.

    Raises ValueError if none does, or one has the wrong size.
    """
    parameters = dict(model.named_parameters())
    shapes = parameter_shapes(model)
    found = read_changes(file)
    matched = {name: change for name, change in found.items() if name in parameters or f"{name}.weight" in parameters}
    if not matched:
        example = next(iter(found), "nothing")
        raise ValueError(
            f"The LoRA {file.path.name} fits no layer of this model (it has {len(found)}, first '{example}'): it was "
            "made for another model, or the block selection leaves nothing."
        )
    for name, change in matched.items():
        shape = shapes.get(name, shapes.get(f"{name}.weight"))
        if not change.fits(shape):
            raise ValueError(
                f"The LoRA {file.path.name} was made for another size of model: its change of '{name}' does not fit "
                f"{tuple(shape)}."
            )
    unmatched = len(found) - len(matched)
    log.info("LoRA %s: %d layers matched, %d not in this model.", file.path.name, len(matched), unmatched)
    return matched


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all parameters as the model has them: a quantised weight's values, not its storage."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            shapes[f"{name}.weight"] = weight_shape(layer)
    return shapes


def differences(name: str, change: Change, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Names of the model's parameters that the change of `name` concerns, with the difference at strength 1, float32.

    shapes: `parameter_shapes` of the model. Raises ValueError for a bias that the layer does not have.
    """
    parameter = name if name in shapes else f"{name}.weight"
    delta = change.weight(shapes[parameter])
    if delta is not None:
        yield parameter, delta
    if change.diff_b is not None:
        if f"{name}.bias" not in shapes:
            raise ValueError(f"A LoRA changes the bias of '{name}', which has none: it was made for another model.")
        yield f"{name}.bias", change.diff_b.float()


def _kept_changes(file: LoraFile, model: nn.Module) -> dict[str, Change]:
    kept = _attached.setdefault(model, {})
    if file not in kept:
        kept[file] = changes_for(file, model)
    return kept[file]


class _Shifted(NamedTuple):
    """A small parameter (norm, modulation) that holds its changed value meanwhile; differences by file."""

    parameter: nn.Parameter
    value: Tensor
    differences: dict[int, Tensor]


class Beside:
    """Unmerged LoRAs at work: strengths of products are tensors, so that graphs stay; small parameters are changed."""

    def __init__(self, files: Sequence[LoraFile], device: torch.device) -> None:
        self.strengths = [torch.tensor(file.at(0), device=device) for file in files]
        self._files = files
        self._shifted: dict[int, _Shifted] = {}
        self._now: tuple[float, ...] = ()

    def shift(self, file: int, parameter: nn.Parameter, difference: Tensor) -> None:
        """Change a small parameter too, from the next `set_step` on."""
        entry = self._shifted.setdefault(id(parameter), _Shifted(parameter, parameter.data, {}))
        entry.differences[file] = difference.to(parameter.device)

    def set_step(self, step: int) -> None:
        """Strengths of this step; called between forwards."""
        wanted = tuple(file.at(step) for file in self._files)
        if wanted == self._now:
            return
        self._now = wanted
        for strength, value in zip(self.strengths, wanted, strict=True):
            strength.fill_(value)
        for parameter, value, changes in self._shifted.values():
            total = sum(wanted[file] * difference for file, difference in changes.items())
            parameter.data = (value.float() + total).to(value.dtype)

    def restore(self) -> None:
        """Small parameters as they were."""
        for parameter, value, _ in self._shifted.values():
            parameter.data = value


@contextmanager
def beside(model: nn.Module, files: Sequence[LoraFile], device: torch.device, dtype: torch.dtype) -> Iterator[Beside]:
    """Inside, the unmerged LoRAs work: layers add strength * (x @ down.T) @ up.T, computed in `dtype`.

    Norms and modulation, which are small, are changed themselves. Enter it outside of block swap, which holds values.
    """
    state = Beside(files, device)
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    shapes, handles = parameter_shapes(model), []
    try:
        for index, (file, strength) in enumerate(zip(files, state.strengths, strict=True)):
            for name, change in _kept_changes(file, model).items():
                layer = layers.get(name)
                if layer is not None and len(weight_shape(layer)) > 1:
                    hook = _hook(change, strength, layer, (device, dtype))
                    handles.append(layer.register_forward_hook(hook))
                    continue
                for parameter, difference in differences(name, change, shapes):
                    state.shift(index, parameters[parameter], difference)
        state.set_step(0)
        yield state
    finally:
        state.restore()
        for handle in handles:
            handle.remove()


def _hook(change: Change, strength: Tensor, layer: nn.Module, place: tuple[torch.device, torch.dtype]) -> object:
    bias = None if change.diff_b is None else change.diff_b.to(*place)
    shape = weight_shape(layer)
    if change.diff is None and change.down is not None and len(shape) == 2:
        down, up = change.down.to(*place).contiguous(), (change.up * change.factor).to(*place).contiguous()

        def low_rank(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            delta = F.linear(F.linear(inputs[0].to(down.dtype), down), up)
            delta = delta if bias is None else delta + bias
            return output + (strength * delta).to(output.dtype)

        return low_rank
    weight = change.weight(shape)
    difference = None if weight is None else weight.to(*place)

    def full(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        delta = 0 if difference is None else _product(layer, inputs[0].to(difference.dtype), difference)
        if bias is not None:
            delta = delta + bias.view(-1, *(1,) * (len(shape) - 2))
        return output + (strength * delta).to(output.dtype)

    return full


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv3d):
        return F.conv3d(x, weight, stride=layer.stride)
    return F.linear(x, weight)
