"""LoRA: low-rank changes of linear layers, merged into the weights or run beside them.

Source: Hu et al. 2021; key names of Kijai's, ComfyUI's, diffusers', PEFT's and kohya's files are facts.
A change is strength * (alpha / rank) * up @ down, or a full difference (`diff`, and `diff_b` for the bias).
"""

from __future__ import annotations

import logging
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
}
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
    return from_diffusers(layer), PARTS[part]


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
    """The changes that fit layers of `model`; logs how many did.

    Raises ValueError if none does, or one has the wrong size.
    """
    layers = dict(model.named_modules())
    found = read_changes(file)
    matched = {layer: change for layer, change in found.items() if hasattr(layers.get(layer), "weight")}
    if not matched:
        example = next(iter(found), "nothing")
        raise ValueError(
            f"The LoRA {file.path.name} fits no layer of this model (it has {len(found)}, first '{example}'): it was "
            "made for another model, or the block selection leaves nothing."
        )
    for layer, change in matched.items():
        weight = layers[layer].weight
        if change.down is not None and change.up.shape[0] != weight.shape[0]:
            raise ValueError(
                f"The LoRA {file.path.name} was made for another size of model: '{layer}' has {weight.shape[0]} rows, "
                f"the LoRA {change.up.shape[0]}."
            )
    unmatched = len(found) - len(matched)
    log.info("LoRA %s: %d layers matched, %d not in this model.", file.path.name, len(matched), unmatched)
    return matched


def _kept_changes(file: LoraFile, model: nn.Module) -> dict[str, Change]:
    kept = _attached.setdefault(model, {})
    if file not in kept:
        kept[file] = changes_for(file, model)
    return kept[file]


class _Beside:
    """Runs unmerged LoRAs beside their layers through forward hooks; strengths are tensors, so that graphs stay."""

    def __init__(self, files: Sequence[LoraFile], device: torch.device) -> None:
        self.strengths = [torch.tensor(file.at(0), device=device) for file in files]
        self._files = files

    def set_step(self, step: int) -> None:
        for file, strength in zip(self._files, self.strengths, strict=True):
            strength.fill_(file.at(step))


@contextmanager
def beside(model: nn.Module, files: Sequence[LoraFile], device: torch.device, dtype: torch.dtype) -> Iterator[_Beside]:
    """Inside, every layer adds strength * (x @ down.T) @ up.T of each unmerged LoRA, computed in `dtype`."""
    state = _Beside(files, device)
    layers = dict(model.named_modules())
    handles = []
    try:
        for file, strength in zip(files, state.strengths, strict=True):
            for name, change in _kept_changes(file, model).items():
                hook = _hook(change, strength, layers[name], (device, dtype))
                handles.append(layers[name].register_forward_hook(hook))
        yield state
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change, strength: Tensor, layer: nn.Module, place: tuple[torch.device, torch.dtype]) -> object:
    bias = None if change.diff_b is None else change.diff_b.to(*place)
    if change.diff is None and change.down is not None and layer.weight.dim() == 2:
        down, up = change.down.to(*place).contiguous(), (change.up * change.factor).to(*place).contiguous()

        def low_rank(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            delta = F.linear(F.linear(inputs[0].to(down.dtype), down), up)
            delta = delta if bias is None else delta + bias
            return output + (strength * delta).to(output.dtype)

        return low_rank
    weight = change.weight(layer.weight.shape)
    difference = None if weight is None else weight.to(*place)

    def full(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        delta = 0 if difference is None else _apply(layer, inputs[0].to(difference.dtype), difference)
        if bias is not None:
            delta = delta + bias.view(-1, *(1 for _ in range(difference.dim() - 2 if _is_conv(layer) else 0)))
        return output + (strength * delta).to(output.dtype)

    return full


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv3d)


def _apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if _is_conv(layer):
        return F.conv3d(x, weight, stride=layer.stride)
    if weight.dim() == 2:
        return F.linear(x, weight)
    raise ValueError(f"An unmerged LoRA cannot change a layer of kind {type(layer).__name__}; set merge_loras.")
