"""From a checkpoint file to a model that the sampler can run.

header -> sizes and extensions -> module on the meta device -> LoRA merged and tensors assigned -> report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..attention import AttentionSpec
from ..tensor_layout import watch
from .architecture import config_of
from .assign import LoadReport, check, fill, layer_count
from .attention_plan import AttentionPlan, plan_for
from .block_swap import BlockSwapArgs, Placement
from .checkpoint import Checkpoint, open_checkpoint
from .compilation import CompileArgs, compiled
from .conditioning import Payload
from .config import WanConfig
from .extension import Extension
from .families import TRANSFORMER, Kind
from .lora import LoraFile, MergedLoras, beside, widening
from .lora_weights import take
from .memory import AT_ONCE
from .modules.model import WanModel
from .quantization import Plan, describe, plan_of, say_what_is_overruled
from .systems import Systems

if TYPE_CHECKING:
    from ..host import Host, Managed

log = logging.getLogger("wanvideo")

FULL_PRECISION = ("patch_embedding",)
KEPT_PRECISION = ("modulation", "norm")


@dataclass(frozen=True)
class ModuleFile:
    """A file whose weights belong to a model, as its node chose it. kind: what it must be."""

    path: Path
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the loader node asks for. modules: files whose weights belong to the model."""

    base_dtype: torch.dtype
    quantization: str = "disabled"
    attention_mode: str = "sdpa"
    modules: tuple[ModuleFile, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    block_swap: BlockSwapArgs | None = None
    compile: CompileArgs | None = None
    fp16_accumulation: bool = False
    keep_on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class WanVideoModel:
    """A loaded transformer and how to run it (socket WANVIDEOMODEL). Copies share the weights.

    payloads: what nodes between loader and sampler condition every run of this copy on.
    """

    transformer: WanModel
    managed: Managed
    placement: Placement
    path: Path
    options: LoadOptions
    report: LoadReport
    attention: AttentionPlan
    attention_spec: AttentionSpec
    loras: tuple[LoraFile, ...] = ()
    block_swap: BlockSwapArgs | None = None
    payloads: tuple[Payload, ...] = ()
    _listeners: list[object] = field(default_factory=list, repr=False, compare=False)

    @property
    def config(self) -> WanConfig:
        """Sizes of the transformer."""
        return self.transformer.config

    @property
    def base_dtype(self) -> torch.dtype:
        """Precision of activations."""
        return self.options.base_dtype

    def try_attention(self, latent_size: Sequence[int], batch: int) -> None:
        """Try the attention kernels on latents of this size (frames, height, width), before the model needs the memory.

        batch: how many passes share a forward. Raises ValueError where one fails.
        """
        sizes = zip(latent_size, self.config.patch_size, strict=True)
        self.attention.try_out(self.attention_spec, math.prod(size // patch for size, patch in sizes), batch)

    def set_step(self, index: int, *, filled: bool = True) -> None:
        """Strengths of LoRAs beside the weights for the step that comes, counted from 0 in the run.

        filled: whether its payloads fill the channels that control LoRAs read.
        """
        for listener in self._listeners:
            listener.set_step(index, filled=filled)

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
            stack.enter_context(self.transformer.attending(self.attention))
            stack.enter_context(self.placement.swapping(device))
            stack.enter_context(self.transformer.sparing(AT_ONCE if self.placement.waits else 0))
            stack.enter_context(compiled(self.transformer.stacks().values(), self.options.compile))
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


def load_wan_model(path: Path, options: LoadOptions, host: Host, systems: Systems) -> WanVideoModel:
    """Load a Wan transformer with the module files that belong to it. systems: those that it may have.

    Raises ValueError, in one sentence, if a file is of another kind or incomplete, or an option cannot run.
    """
    plan = planned(path, options, host, systems)
    say_what_is_overruled(options.quantization, plan.checkpoint)
    with torch.device("meta"):
        model = WanModel(plan.config, plan.extensions)
    report = _fill(model, plan.checkpoint, plan.quantization, [file for file in plan.loras if file.merge])
    if plan.channels > plan.config.in_dim:
        widening.widen(model.patch_embedding, plan.channels)
        model.config = replace(plan.config, in_dim=plan.channels)
    watch(model)
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
        attention=plan.attention,
        attention_spec=plan.attention_spec,
        loras=tuple(file for file in plan.loras if not file.merge),
        block_swap=options.block_swap,
    )


class _Planned(NamedTuple):
    """What a load will be, from headers and options alone.

    config: of the file; channels: that the model reads in the end, more where a control LoRA widens it.
    """

    config: WanConfig
    channels: int
    extensions: tuple[Extension, ...]
    checkpoint: Checkpoint
    loras: tuple[LoraFile, ...]
    quantization: Plan
    attention_spec: AttentionSpec
    attention: AttentionPlan


def planned(path: Path, options: LoadOptions, host: Host, systems: Systems) -> _Planned:
    """What `load_wan_model` will do; no weights are read. Raises ValueError as it does."""
    main = with_aliases(open_checkpoint(path), systems)
    config = config_of(main, systems)
    weights = take(options.loras, systems)
    for brought in weights.checkpoints:
        _check_layers(brought, config)
    checkpoint = main.joined([*(_module(file, config, systems) for file in options.modules), *weights.checkpoints])
    loras, channels = widening.marked(weights.loras, config)
    spec = AttentionSpec(
        device=host.device(), heads=config.num_heads, head_dim=config.head_dim, dtype=options.base_dtype
    )
    return _Planned(
        config=config,
        channels=channels,
        extensions=weights.strengthened(systems.detect(_shapes(checkpoint, channels))),
        checkpoint=checkpoint,
        loras=loras,
        quantization=plan_of(options.quantization, main, device=host.device(), base=options.base_dtype),
        attention_spec=spec,
        attention=plan_for(options.attention_mode, spec),
    )


def module_files(sockets: Iterable[tuple[str, object]]) -> tuple[ModuleFile, ...]:
    """The module files among the values of a loader's sockets; a tuple holds several.

    Raises ValueError, naming the socket, for another value.
    """
    files: list[ModuleFile] = []
    for name, value in sockets:
        for file in value if isinstance(value, tuple) else (value,):
            if isinstance(file, ModuleFile):
                files.append(file)
            elif file is not None:
                raise ValueError(
                    f"The input '{name}' of the model loader got a {type(file).__name__}, which this version cannot "
                    "use: disconnect it."
                )
    return tuple(files)


def _module(file: ModuleFile, config: WanConfig, systems: Systems) -> Checkpoint:
    """What a transformer reads of a module file, under published names.

    Raises ValueError for another kind of file, or a module of another model.
    """
    checkpoint = with_aliases(open_checkpoint(file.path), systems)
    name, kind = file.path.name, systems.kind_of(checkpoint.shapes)
    if kind is None or (file.kind is not None and kind.name != file.kind.name):
        held = "an unknown kind of file" if kind is None else f"a {kind.name}"
        wanted = "a module of a Wan transformer" if file.kind is None else f"a {file.kind.name}"
        loader = f"; load it with '{kind.loader}'" if kind is not None and kind.loader else ""
        raise ValueError(f"{name} is {held}, not {wanted}{loader or '; choose another file'}.")
    _check_layers(checkpoint, config)
    return checkpoint.chosen(lambda key: not key.startswith(kind.own))


def _check_layers(checkpoint: Checkpoint, config: WanConfig) -> None:
    layers = layer_count(checkpoint.shapes, "blocks.")
    if layers > config.num_layers:
        raise ValueError(
            f"{checkpoint.path.name} belongs to a transformer of at least {layers} blocks, but the chosen one has "
            f"{config.num_layers}: choose the module of the same size (14B or 1.3B) as the model."
        )


def with_aliases(checkpoint: Checkpoint, systems: Systems) -> Checkpoint:
    """The checkpoint with other names and older prefixes of the extensions replaced by the published ones."""
    aliases = [pair for kind in systems.extensions for pair in kind.aliases.items()]

    def rename(name: str) -> str:
        for kind in systems.extensions:
            name = kind.published(name)
        for old, new in aliases:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return checkpoint.renamed(rename)


def _shapes(checkpoint: Checkpoint, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, the patch embedding's as it is once it reads so many channels."""
    dim, _, *patch = checkpoint.shapes["patch_embedding.weight"]
    return {**checkpoint.shapes, "patch_embedding.weight": (dim, channels, *patch)}


def _fill(model: WanModel, checkpoint: Checkpoint, plan: Plan, loras: Sequence[LoraFile]) -> LoadReport:
    names = {name: name for name, _ in model.named_parameters()}
    report = check(model, checkpoint, names, what=TRANSFORMER)
    merged = MergedLoras(loras, model, checkpoint)
    with torch.no_grad():
        for name, plain in list(model.named_modules()):
            if not isinstance(plain, nn.Linear):
                continue
            layer = plan.layer(checkpoint, name, plain, merged, in_block=quantizable(model, name))
            if layer is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
        fill(model, checkpoint, names, dtype_of=lambda name: _dtype(name, checkpoint, plan.base))
        merged.add_to_others(model)
    describe(model)
    return report


def quantizable(model: WanModel, name: str) -> bool:
    """Whether the layer of this name may be quantized: it lies in a block, and no system wants it in base precision."""
    kept = (part for extension in model.extensions for part in extension.high_precision)
    return name.startswith(tuple(f"{stack}." for stack in model.stacks())) and not any(
        f".{part}." in f".{name}." for part in kept
    )


def _dtype(name: str, checkpoint: Checkpoint, base: torch.dtype) -> torch.dtype:
    if any(part in name for part in FULL_PRECISION):
        return torch.float32
    stored = checkpoint.dtypes[name]
    if any(part in name for part in KEPT_PRECISION) and stored == torch.float32:
        return torch.float32
    return base


def with_loras(model: WanVideoModel, files: Sequence[LoraFile]) -> WanVideoModel:
    """The same weights with these unmerged LoRAs. Raises ValueError for one that asks to be merged."""
    merged = next((file for file in files if file.merge), None)
    if merged is not None:
        raise ValueError(
            f"The LoRA {merged.path.name} has merge_loras on, which only works in WanVideoModelLoader: turn it off, or "
            "connect the LoRA to the loader."
        )
    widening.refuse_wide(files, model.config)
    return replace(model, loras=tuple(files))
