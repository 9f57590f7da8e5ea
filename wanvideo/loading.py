"""From a checkpoint file to a model that the sampler can run.

header -> sizes and extensions -> module on the meta device -> tensors assigned -> LoRA merged -> report.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import attention
from ..fp8_optimization import FP8_DTYPES, Fp8Linear, keeps_precision
from . import registry
from .architecture import config_of
from .assign import LoadReport, check, fill
from .block_swap import BlockSwapArgs, Placement
from .checkpoint import Checkpoint, open_checkpoint
from .compilation import CompileArgs, compiled
from .config import WanConfig
from .families import TRANSFORMER
from .lora import LoraFile, beside, changes_for, differences
from .modules.model import WanModel

if TYPE_CHECKING:
    from ..host import Host, Managed

log = logging.getLogger("wanvideo")

QUANTIZATIONS = (
    "disabled",
    "fp8_e4m3fn",
    "fp8_e4m3fn_fast",
    "fp8_e4m3fn_scaled",
    "fp8_e4m3fn_scaled_fast",
    "fp8_e5m2",
    "fp8_e5m2_fast",
    "fp8_e5m2_scaled",
    "fp8_e5m2_scaled_fast",
)
FULL_PRECISION = ("patch_embedding",)
KEPT_PRECISION = ("modulation", "norm")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the loader node asks for. modules: files whose weights belong to the model (MultiTalk, InfiniteTalk)."""

    base_dtype: torch.dtype
    quantization: str = "disabled"
    attention_mode: str = "sdpa"
    modules: tuple[Path, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    block_swap: BlockSwapArgs | None = None
    compile: CompileArgs | None = None
    fp16_accumulation: bool = False
    keep_on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class WanVideoModel:
    """A loaded transformer and how to run it (socket WANVIDEOMODEL). Copies share the weights."""

    transformer: WanModel
    managed: Managed
    placement: Placement
    path: Path
    options: LoadOptions
    report: LoadReport
    loras: tuple[LoraFile, ...] = ()
    block_swap: BlockSwapArgs | None = None
    _listeners: list[object] = field(default_factory=list, repr=False, compare=False)

    @property
    def config(self) -> WanConfig:
        """Sizes of the transformer."""
        return self.transformer.config

    @property
    def base_dtype(self) -> torch.dtype:
        """Precision of activations."""
        return self.options.base_dtype

    @property
    def talk_kind(self) -> str:
        """How its talking video goes on from window to window; file names tell, as for the original's users."""
        names = [self.path.name, *(module.name for module in self.options.modules)]
        return "infinitetalk" if any("infinite" in name.lower() for name in names) else "multitalk"

    def set_step(self, index: int) -> None:
        """Strengths of per-step LoRAs for the step that comes, counted from 0 in the run."""
        for listener in self._listeners:
            listener.set_step(index)

    @contextmanager
    def active(self) -> Iterator[WanModel]:
        """The transformer on the compute device, with block swap, unmerged LoRAs and compilation; undone afterwards."""
        self.placement.swap = self.block_swap
        device = self.managed.acquire()
        with ExitStack() as stack:
            stack.enter_context(_fp16_accumulation(self.options.fp16_accumulation))
            if self.loras:
                listener = stack.enter_context(beside(self.transformer, self.loras, device, self.base_dtype))
                self._listeners.append(listener)
                stack.callback(self._listeners.remove, listener)
            stack.enter_context(self.placement.swapping(device))
            stack.enter_context(compiled(self.transformer.blocks, self.options.compile))
            yield self.transformer


@contextmanager
def _fp16_accumulation(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_accumulation
    settings.allow_fp16_accumulation = True
    try:
        yield
    finally:
        settings.allow_fp16_accumulation = before


def load_wan_model(path: Path, options: LoadOptions, host: Host) -> WanVideoModel:
    """Load a Wan transformer, with the module files that belong to it.

    Raises ValueError, in one sentence, if a file is of another kind or incomplete, or an option cannot run.
    """
    main = open_checkpoint(path)
    config = config_of(main)
    checkpoint = with_aliases(main).joined([with_aliases(open_checkpoint(module)) for module in options.modules])
    plan = _Quantization.of(options.quantization, checkpoint)
    backend = attention.resolve(options.attention_mode, device=host.device(), head_dim=config.head_dim)
    log.info("Self-attention runs on '%s', cross-attention on 'sdpa'.", backend.name)
    with torch.device("meta"):
        model = WanModel(config, registry.detect(checkpoint.shapes), backend)
    merged = [file for file in options.loras if file.merge]
    report = _fill(model, checkpoint, plan, options.base_dtype)
    for file in merged:
        _merge(model, file)
    placement = Placement(model, host.offload_device())
    placement.swap = options.block_swap
    managed = host.manage(model, place=placement)
    if options.keep_on_device:
        managed.acquire()
    return WanVideoModel(
        transformer=model,
        managed=managed,
        placement=placement,
        path=path,
        options=options,
        report=report,
        loras=tuple(file for file in options.loras if not file.merge),
        block_swap=options.block_swap,
    )


def with_aliases(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with older key prefixes of the extensions replaced by the published ones."""
    aliases = [pair for kind in registry.EXTENSIONS for pair in kind.aliases.items()]

    def rename(name: str) -> str:
        for old, new in aliases:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return checkpoint.renamed(rename)


@dataclass(frozen=True)
class _Quantization:
    """Which FP8 type weights are converted to at load; None keeps what the file holds."""

    convert: torch.dtype | None

    @classmethod
    def of(cls, option: str, checkpoint: Checkpoint) -> _Quantization:
        """Check the option against the file."""
        if option not in QUANTIZATIONS or option.endswith("_fast"):
            works = ", ".join(name for name in QUANTIZATIONS if not name.endswith("_fast"))
            raise ValueError(f"quantization '{option}' is not available in this version; choose one of: {works}.")
        if option == "disabled":
            return cls(None)
        scaled = any("scaled" in form for form in checkpoint.formats.values())
        if option.endswith("_scaled") and not scaled:
            raise ValueError(
                f"quantization '{option}' needs a file with scales, and {checkpoint.path.name} has none: choose "
                f"'{option.removesuffix('_scaled')}' or 'disabled'."
            )
        return cls(None if scaled else FP8_DTYPES[option.removesuffix("_scaled")])


def _fill(model: WanModel, checkpoint: Checkpoint, plan: _Quantization, base: torch.dtype) -> LoadReport:
    names = {name: name for name, _ in model.named_parameters()}
    report = check(model, checkpoint, names, what=TRANSFORMER)
    quantised = [name for name, layer in model.named_modules() if _is_quantised(name, layer, checkpoint, plan)]
    with torch.no_grad():
        for name in quantised:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _fp8_linear(checkpoint, name, plan, base))
        fill(model, checkpoint, names, dtype_of=lambda name: _dtype(name, checkpoint, base))
    if quantised:
        log.info("%d linear layers are stored in FP8 and expanded to %s for their product.", len(quantised), base)
    return report


def _is_quantised(name: str, layer: nn.Module, checkpoint: Checkpoint, plan: _Quantization) -> bool:
    if not isinstance(layer, nn.Linear) or not name.startswith("blocks.") or keeps_precision(name):
        return False
    return plan.convert is not None or checkpoint.formats[f"{name}.weight"].startswith("F8_")


def _fp8_linear(checkpoint: Checkpoint, name: str, plan: _Quantization, base: torch.dtype) -> Fp8Linear:
    bias = checkpoint.tensor(f"{name}.bias").to(base) if f"{name}.bias" in checkpoint.shapes else None
    if checkpoint.formats[f"{name}.weight"].startswith("F8_"):
        weight, scale = checkpoint.stored(f"{name}.weight")
        scale = torch.ones(()) if scale is None else scale
        rows = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
        return Fp8Linear(weight, rows, bias)
    return Fp8Linear.quantise(checkpoint.tensor(f"{name}.weight"), bias, plan.convert)


def _dtype(name: str, checkpoint: Checkpoint, base: torch.dtype) -> torch.dtype:
    if any(part in name for part in FULL_PRECISION):
        return torch.float32
    stored = checkpoint.dtypes[name]
    if any(part in name for part in KEPT_PRECISION) and stored == torch.float32:
        return torch.float32
    return base


@torch.no_grad()
def _merge(model: WanModel, file: LoraFile) -> None:
    """Add a LoRA to the weights, in float32. Raises ValueError if its strength changes by the step."""
    if not isinstance(file.strength, float | int):
        raise ValueError(
            f"The LoRA {file.path.name} has a strength for every step, so it cannot be merged: turn merge_loras off."
        )
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, change in changes_for(file, model).items():
        for parameter, difference in differences(name, change, parameters):
            if parameter.dtype in FP8_DTYPES.values():
                layers[name].add(file.strength * difference)
            else:
                parameter.data = (parameter.float() + file.strength * difference).to(parameter.dtype)


def with_loras(model: WanVideoModel, files: Sequence[LoraFile]) -> WanVideoModel:
    """The same weights with these unmerged LoRAs. Raises ValueError for one that asks to be merged."""
    merged = next((file for file in files if file.merge), None)
    if merged is not None:
        raise ValueError(
            f"The LoRA {merged.path.name} has merge_loras on, which only works in WanVideoModelLoader: turn it off, or "
            "connect the LoRA to the loader."
        )
    return replace(model, loras=tuple(files))
