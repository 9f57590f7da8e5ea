"""A LoRA file, fitted to a model: the changes that it makes there, and what becomes of every one of its keys.

Nothing is dropped without a word: a key is used, not asked for by the nodes, claimed by another system, or left out
with a reason, and one log line counts them (each key is in the debug log).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...quantized.linear import SCALE_NAMES, weight_shape
from ..families import kind_of
from ..model_file import open_files
from ..tensor_file import Parts, TensorFile
from .file import LoraFile
from .kinds import OTHER_SIZE, Change, read_change
from .names import OWN_PAIR, OWN_PAIR_MARK, TEXT_ENCODER, LayerNames, bare, split_key
from .scaling import Scaling, scaling_of

log = logging.getLogger("wanvideo")

USED = "used"
NOT_SELECTED = "not selected"
CLAIMED = "taken by another system"
ABSENT = "of layers that this model does not have"
MISFIT = "that do not fit"
TEXT = "of a text encoder"
UNKNOWN = "that are no part of a change"
# A file with less than this share of fitting layers was made for another model, whatever fits by chance.
LEAST_SHARE = 1 / 20
_WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
_ALPHAS = ("I64", "I32", "I16")


class Target(NamedTuple):
    """A layer, or a parameter outside layers, that a LoRA can change. bias: its size, None where there is none."""

    shape: torch.Size
    bias: int | None


class Fate(NamedTuple):
    """What became of a key: one of the words above, and why."""

    kind: str
    reason: str = ""


class LeftOut(NamedTuple):
    """A layer's keys that do not fit the model. layer: the model's name of it, or the file's."""

    layer: str
    keys: tuple[str, ...]
    reason: str


class Group(NamedTuple):
    """The keys of one change: the layer as the file spells it, and its keys by part."""

    layer: str
    keys: dict[str, str]


@dataclass(frozen=True)
class LoraTensors:
    """An open LoRA file. groups: by their common beginning; strays: keys that are no part of a change."""

    path: Path
    file: TensorFile
    groups: Mapping[str, Group]
    strays: tuple[str, ...]
    scales: Mapping[str, str]

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, FP8 with a scale expanded."""
        value, scale = self.file.read(key), self.scales.get(key)
        if scale is None:
            return value
        scales = self.file.read(scale).float().flatten()
        return value.float() * scales.view(-1, *(1 for _ in value.shape[1:]))

    def parts(self, group: str) -> dict[str, Tensor]:
        """The tensors of one change."""
        return {part: self.read(key) for part, key in self.groups[group].keys.items()}


@dataclass
class Lora:
    """What a file changes in one model: changes by the model's names, and the fate of every key."""

    name: str
    changes: dict[str, list[Change]] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


def open_lora(path: Path) -> LoraTensors:
    """Read the header of a LoRA file. Raises what `open_files` raises."""
    files = open_files(path)
    file = files[0] if len(files) == 1 else Parts(files)
    scales = _scales(file)
    groups: dict[str, Group] = {}
    strays = []
    for key in file.tensors:
        if key in scales.values():
            continue
        found = split_key(key)
        group = None if found is None else groups.setdefault(found.group, Group(found.layer, {}))
        if group is None or found.part in group.keys:
            strays.append(key)
        else:
            group.keys[found.part] = key
    return LoraTensors(path, file, groups, tuple(strays), scales)


def _scales(file: TensorFile) -> dict[str, str]:
    """Scales of FP8 tensors, by the key of what they multiply."""
    found = {}
    for key, stored in file.tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and stored.format.startswith("F8_"):
            name = next((f"{layer}.{scale}" for scale in SCALE_NAMES if f"{layer}.{scale}" in file.tensors), None)
            if name is not None:
                found[key] = name
    return found


def targets_of(model: nn.Module) -> dict[str, Target]:
    """What can be changed in a model, whatever storage its layers have."""
    targets = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        bias = None if own.get("bias") is None else own["bias"].numel()
        if isinstance(module, nn.Linear) or "weight" in own:
            targets[name] = Target(weight_shape(module), bias)
        if not isinstance(module, nn.Linear):
            others = {leaf: p for leaf, p in own.items() if leaf not in ("weight", "bias")}
            targets |= {f"{name}.{leaf}".lstrip("."): Target(p.shape, None) for leaf, p in others.items()}
    return targets


def read_lora(file: LoraFile, model: nn.Module) -> Lora:
    """The changes of the file that fit the model, which may still be on the meta device; logs one line.

    Raises ValueError, naming what the file holds, where nothing or nearly nothing fits.
    """
    source, targets = open_lora(file.path), targets_of(model)
    names, lora = LayerNames(targets), Lora(file.path.name)
    ranks = frozenset(
        source.file.tensors[g.keys["down"]].shape[0] for g in source.groups.values() if _has_rank(source, g)
    )
    scaling = scaling_of(file.path, source.file.metadata, source.file.tensors, ranks)
    for name, group in source.groups.items():
        _read_group(source, name, (names.find(group.layer), targets), file, scaling, lora)
    for key in source.strays:
        kind = CLAIMED if file.claims(bare(key)) else TEXT if TEXT_ENCODER.match(key) else UNKNOWN
        lora.fates[key] = Fate(kind)
    for key, scale in source.scales.items():
        lora.fates[scale] = lora.fates[key]
    _refuse_misfit(source, lora)
    _report(source, lora, scaling)
    return lora


def _has_rank(source: LoraTensors, group: Group) -> bool:
    return "down" in group.keys and len(source.file.tensors[group.keys["down"]].shape) > 1


def _read_group(
    source: LoraTensors, name: str, place: tuple[str | None, Mapping[str, Target]], file: LoraFile, scaling: Scaling,
    lora: Lora,
) -> None:  # fmt: skip
    group, (layer, targets) = source.groups[name], place
    keys = tuple(group.keys.values())
    if file.claims(bare(name), *([] if layer is None or name.endswith(OWN_PAIR_MARK) else [layer])):
        lora.fates |= dict.fromkeys(keys, Fate(CLAIMED))
        return
    if layer is None:
        kind = TEXT if TEXT_ENCODER.match(group.layer) else ABSENT
        lora.fates |= dict.fromkeys(keys, Fate(kind))
        lora.left_out.append(LeftOut(bare(group.layer), keys, kind))
        return
    if not file.selects(layer):
        lora.fates |= dict.fromkeys(keys, Fate(NOT_SELECTED))
        return
    parts, unused = _sound_parts(source, group)
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    reading = read_change(parts, partial(scaling.factor, group.layer, alpha), *targets[layer], unused)
    unused = reading.unused | unused
    if reading.change.deltas or reading.change.bias is not None:
        lora.changes.setdefault(layer, []).append(reading.change)
    for part, key in group.keys.items():
        lora.fates[key] = Fate(MISFIT, unused[part]) if part in unused else Fate(USED)
    for reason in dict.fromkeys(unused.values()):
        left = tuple(group.keys[part] for part, why in unused.items() if why == reason)
        lora.left_out.append(LeftOut(layer, left, reason))


def _sound_parts(source: LoraTensors, group: Group) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a change that hold numbers, and why the others are left out."""
    parts, unused = {}, {}
    for part, key in group.keys.items():
        stored = source.file.tensors[key]
        if stored.format in _WHOLE_NUMBERS and not (part == "alpha" and stored.format in _ALPHAS):
            unused[part] = f"it is stored as {stored.format}"
            continue
        scale = source.scales.get(key)
        if scale is not None and math.prod(source.file.tensors[scale].shape) not in (1, *stored.shape[:1]):
            unused[part] = f"its scale has the shape {source.file.tensors[scale].shape}"
            continue
        value = source.read(key)
        if part == "alpha" and value.numel() != 1:
            unused[part] = f"it has {value.numel()} values"
        elif not bool(torch.isfinite(value if value.element_size() > 1 else value.float()).all()):
            unused[part] = "it holds values that are not finite"
        else:
            parts[part] = value.reshape(()) if part == "alpha" else value
    return parts, unused


def _refuse_misfit(source: LoraTensors, lora: Lora) -> None:
    """Raise ValueError where nothing or nearly nothing of the file fits, unless another system takes something."""
    kinds = [fate.kind for fate in lora.fates.values()]
    used, total = kinds.count(USED), sum(kinds.count(kind) for kind in (USED, ABSENT, MISFIT, TEXT, UNKNOWN))
    if CLAIMED in kinds or (used and used >= LEAST_SHARE * total):
        return
    name = source.path.name
    if not source.groups:
        raise ValueError(f"{name} changes no layer of any model: {_contents(source)}; choose a LoRA file.")
    if NOT_SELECTED in kinds and not used:
        selected = kinds.count(NOT_SELECTED)
        raise ValueError(
            f"The LoRA {name} fits no layer that the block selection leaves: {selected} of its keys are of other "
            "blocks, or of layers in layer_filter; select more."
        )
    share = "no layer" if not used else f"only {len(lora.changes)} layers"
    raise ValueError(f"The LoRA {name} fits {share} of this model: {_contents(source)}; {_why(lora)}.")


def _contents(source: LoraTensors) -> str:
    """What a file holds, in words."""
    keys = source.file.tensors
    if not keys:
        return "it holds no tensors"
    if source.groups:
        return f"it holds changes of {len(source.groups)} layers, first '{next(iter(source.groups.values())).layer}'"
    kind = kind_of({key: stored.shape for key, stored in keys.items()})
    return f"it holds {len(keys)} tensors, first '{next(iter(keys))}'" + ("" if kind is None else f" (a {kind.name})")


def _why(lora: Lora) -> str:
    misfit = next((left for left in lora.left_out if left.reason not in (ABSENT, TEXT)), None)
    if misfit is None:
        return "it was made for another model"
    cause = "it was made for another size of model" if misfit.reason.startswith(OTHER_SIZE) else "it may be damaged"
    return f"{cause}: its change of '{misfit.layer}' is left out, as {misfit.reason}"


def _report(source: LoraTensors, lora: Lora, scaling: Scaling) -> None:
    for key, fate in lora.fates.items():
        log.debug("LoRA %s: %s: %s%s", lora.name, key, fate.kind, fate.reason and f" ({fate.reason})")
    notes = [f"{len(lora.changes)} layers changed by {_count(lora, USED)} of its {len(lora.fates)} keys"]
    if scaling.source:
        notes.append(f"alpha from {scaling.source}")
    for kind in (NOT_SELECTED, CLAIMED):
        if _count(lora, kind):
            notes.append(f"{_count(lora, kind)} keys {kind}")
    for kind in (ABSENT, MISFIT, TEXT, UNKNOWN):
        first = next(((key, fate) for key, fate in lora.fates.items() if fate.kind == kind), None)
        if first is not None:
            because = f": {first[1].reason}" if first[1].reason else ""
            notes.append(f"left out {_count(lora, kind)} keys {kind} (first '{first[0]}'{because})")
    if any(lora.fates[key].kind == USED and key.endswith(OWN_PAIR) for key in lora.fates):
        notes.append("Stand-In's pairs, trained for its reference picture alone, change all tokens")
    log.info("LoRA %s: %s.", lora.name, "; ".join(notes))


def _count(lora: Lora, kind: str) -> int:
    return sum(fate.kind == kind for fate in lora.fates.values())
