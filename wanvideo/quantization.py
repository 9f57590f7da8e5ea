"""The `quantization` widget of the model loader: what each option stores, how it multiplies, and which files it takes.

What a file holds wins over what an option would make of it. Which layers are concerned: linear layers in blocks whose
names are not in the high-precision list (fp8_optimization.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..host.residence import tensors_of
from ..host.staging import Staging
from ..quantized.fp8 import FP8_DTYPES, Fp8Linear, refuse_without_fp8, runs_fp8
from ..quantized.linear import QuantizedLinear
from ..quantized.nvfp4 import Nvfp4Linear
from .checkpoint import Checkpoint
from .gguf_file import BLOCKS
from .lora import MergedLoras

log = logging.getLogger("wanvideo")

NVFP4 = "nvfp4"
STORED_AS = {
    "F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2", "NVFP4": NVFP4, "MXFP8": "mxfp8", "INT8": "int8", "INT4": "int4",
    "W4A8": "w4a8", "W6A8": "w6a8", BLOCKS: "gguf",
}  # fmt: skip
# Besides the blocks, the one large layer whose weight no code looks at.
COMPRESSED = "time_projection."
GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A row of the widget. storage: what weights are stored as, None for what the file holds.

    scaled: the file must have scales; fast: products on FP8 or FP4 tensor cores.
    """

    storage: str | None = None
    scaled: bool = False
    fast: bool = False


QUANTIZATIONS: Mapping[str, Option] = {
    "disabled": Option(),
    "fp8_e4m3fn": Option(storage="fp8_e4m3fn"),
    "fp8_e4m3fn_fast": Option(storage="fp8_e4m3fn", fast=True),
    "fp8_e4m3fn_scaled": Option(storage="fp8_e4m3fn", scaled=True),
    "fp8_e4m3fn_scaled_fast": Option(storage="fp8_e4m3fn", scaled=True, fast=True),
    "fp8_e5m2": Option(storage="fp8_e5m2"),
    "fp8_e5m2_fast": Option(storage="fp8_e5m2", fast=True),
    "fp8_e5m2_scaled": Option(storage="fp8_e5m2", scaled=True),
    "fp8_e5m2_scaled_fast": Option(storage="fp8_e5m2", scaled=True, fast=True),
    "fp4_experimental": Option(storage=NVFP4),
    "fp4_scaled": Option(storage=NVFP4),
    "fp4_scaled_fast": Option(storage=NVFP4, fast=True),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one model's linear layers are made.

    convert: storage of weights that the file holds in base precision, None to leave them; fast: see Option; device:
    where the model will run, and where weights are converted; base: precision of activations; anew: names of weights
    that are converted although the file holds them in few bits.
    """

    convert: str | None
    fast: bool
    device: torch.device
    base: torch.dtype
    anew: frozenset[str] = frozenset()

    def layer(
        self, checkpoint: Checkpoint, name: str, plain: nn.Linear, merged: MergedLoras, *, in_block: bool
    ) -> QuantizedLinear | None:
        """What replaces the layer `plain` of this name, with the checkpoint's weights; None where it stays plain.

        merged: the LoRAs that are part of its weight. in_block: it lies in a block and may be quantized.
        """
        weight = f"{name}.weight"
        form = checkpoint.formats[weight]
        stored = STORED_AS.get(form.split()[0])
        if not in_block and not (stored == "gguf" and name.startswith(COMPRESSED)):
            return None
        if stored is None and self.convert is None:
            return None
        bias = checkpoint.tensor(f"{name}.bias").to(self.base) if f"{name}.bias" in checkpoint.shapes else None
        fast = self.fast and not checkpoint.full_precision(weight)
        difference = merged.weight(name)
        if stored is None or weight in self.anew:
            value = checkpoint.tensor(weight, mapped=True)
            return self._converted(value if difference is None else value.float() + difference, bias, fast)
        shape = (plain.out_features, plain.in_features)
        layer = checkpoint.layer(weight, shape, bias, fast=self.device if fast else None)
        if difference is not None:
            layer.to(self.device).add(difference.to(self.device))
            layer.to("cpu")
        return layer

    def _converted(self, weight: torch.Tensor, bias: torch.Tensor | None, fast: bool) -> QuantizedLinear:
        kind, form = (Nvfp4Linear, ()) if self.convert == NVFP4 else (Fp8Linear, (FP8_DTYPES[self.convert],))
        if fast:
            kind = kind.fast_kind(self.device)
        with Staging([weight], self.device) as staging:
            layer = kind.quantize(staging.copy(weight), bias, *form)
            for tensor in tensors_of(layer):
                tensor.data = staging.fetch(tensor.data)
        return layer


def plan_of(name: str, checkpoint: Checkpoint, *, device: torch.device, base: torch.dtype) -> Plan:
    """The plan that the option `name` gives for the main file on this device; module files follow it.

    Quantized weights of a module file stay as they are, whatever the main file holds.
    Raises ValueError, with what to choose instead, where the option cannot run or does not suit the file.
    """
    option = QUANTIZATIONS.get(name)
    if option is None:
        raise ValueError(f"quantization '{name}' does not exist; choose one of: {', '.join(QUANTIZATIONS)}.")
    refuse_fp8_files(checkpoint, device)
    if option.storage is None:
        return Plan(convert=None, fast=False, device=device, base=base)
    file = checkpoint.path.name
    if checkpoint.path.suffix.lower() == GGUF_SUFFIX:
        raise ValueError(f"{file} is a GGUF file, whose own quantization is used: choose quantization 'disabled'.")
    refuse_without_fp8(f"quantization '{name}' makes", device)
    forms = {
        form
        for key, form in checkpoint.formats.items()
        if key.startswith("blocks.") and len(checkpoint.shapes[key]) == 2
    }
    held = {STORED_AS[form.split()[0]] for form in forms if form.split()[0] in STORED_AS}
    if NVFP4 in held and option.storage != NVFP4:
        instead = "fp4_scaled_fast" if option.fast else "fp4_scaled"
        raise ValueError(f"{file} holds NVFP4 weights, so quantization '{name}' does not fit: choose '{instead}'.")
    scaled = any(form.startswith("F8_") and form.endswith("scaled") for form in forms)
    if option.scaled and not scaled:
        raise ValueError(
            f"quantization '{name}' needs a file with scales, and {file} has none: choose "
            f"'{name.replace('_scaled', '')}' or 'disabled'."
        )
    # Integers and MXFP8 have products of their own, which need no FP8 tensor cores.
    kinds = [kind for kind in held if kind in FP8_DTYPES or kind == NVFP4]
    if kinds or not held or any(form.split()[0] not in STORED_AS for form in forms):
        kinds.append(option.storage)
    multiplied = {FP8_DTYPES.get(kind, torch.float8_e4m3fn) for kind in kinds} if option.fast else ()
    reason = next(filter(None, (runs_fp8(device, dtype) for dtype in multiplied)), None)
    if reason is not None:
        raise ValueError(
            f"quantization '{name}' multiplies in FP8 or FP4, which this machine cannot: {reason}. Choose "
            f"'{name.removesuffix('_fast')}', which expands the weights instead."
        )
    _say(name, option, held, scaled, file)
    kept = NVFP4 in held if option.storage == NVFP4 else scaled
    convert = None if kept else option.storage
    anew = {key for key, form in checkpoint.formats.items() if form.startswith("F8_")} if convert == NVFP4 else ()
    return Plan(convert=convert, fast=option.fast, device=device, base=base, anew=frozenset(anew))


def refuse_fp8_files(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise ValueError for a file with weights in FP8 where the device has no such numbers."""
    name = checkpoint.file_with_fp8
    if name is not None:
        refuse_without_fp8(f"{name} holds", device)


def _say(name: str, option: Option, held: set[str], scaled: bool, file: str) -> None:
    """What happens that the option's name does not say."""
    if option.storage == NVFP4:
        if NVFP4 not in held:
            worse = " from FP8, which loses a little more than from bf16" if held else ""
            log.info("%s holds no NVFP4: its weights are quantized now%s.", file, worse)
        return
    if scaled and not option.scaled:
        log.info("%s has scales, so quantization '%s' works as its scaled form.", file, name)
    others = held - {option.storage}
    if others:
        log.info("%s holds %s, which is kept as it is.", file, ", ".join(sorted(others)))


def say_what_is_overruled(name: str, checkpoint: Checkpoint) -> None:
    """Log which files ask for full-precision products by a mark that a fast option does not follow.

    Many files have the mark by their converter's habit, and following it would make the option do nothing for them.
    """
    option = QUANTIZATIONS[name]
    if not option.fast:
        return
    product = "FP8 or FP4" if option.storage == NVFP4 else "FP8"
    for file in checkpoint.asking_full_precision:
        log.info(
            "%s asks for full-precision products (its scaled_fp8 mark has two elements), but quantization '%s' "
            "multiplies in %s all the same; '%s' does as the file asks.",
            file, name, product, name.removesuffix("_fast"),
        )  # fmt: skip


def describe(model: nn.Module) -> None:
    """Log how many linear layers are quantized, and how."""
    counts = Counter(layer.label for layer in model.modules() if isinstance(layer, QuantizedLinear))
    for label, count in counts.items():
        log.info("%d linear layers: %s.", count, label)
