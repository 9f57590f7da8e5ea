"""From a checkpoint file to a model that the sampler can run.

header -> sizes and extensions -> module on the meta device -> LoRA merged and tensors assigned -> report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..attention import AttentionSpec
from ..tensor_layout import watch
from . import registry
from .architecture import config_of
from .assign import LoadReport, check, fill
from .attention_plan import AttentionPlan, plan_for
from .block_swap import BlockSwapArgs, Placement
from .checkpoint import Checkpoint, open_checkpoint
from .compilation import CompileArgs, compiled
from .config import WanConfig
from .families import TRANSFORMER
from .lora import LoraFile, MergedLoras, beside
from .modules.model import WanModel
from .quantization import Plan, describe, plan_of, say_what_is_overruled

if TYPE_CHECKING:
    from ..host import Host, Managed

log = logging.getLogger("wanvideo")

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
    attention: AttentionPlan
    attention_spec: AttentionSpec
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

    def try_attention(self, latent_size: Sequence[int], batch: int) -> None:
        """Try the attention kernels on latents of this size (frames, height, width), before the model needs the memory.

        batch: how many passes share a forward. Raises ValueError where one fails.
        """
        sizes = zip(latent_size, self.config.patch_size, strict=True)
        self.attention.try_out(self.attention_spec, math.prod(size // patch for size, patch in sizes), batch)

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
            stack.enter_context(self.transformer.attending(self.attention))
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
    opened = open_checkpoint(path)
    config = config_of(opened)
    main = with_aliases(opened)
    checkpoint = main.joined([with_aliases(open_checkpoint(module)) for module in options.modules])
    plan = plan_of(options.quantization, main, device=host.device(), base=options.base_dtype)
    say_what_is_overruled(options.quantization, checkpoint)
    spec = AttentionSpec(
        device=host.device(), heads=config.num_heads, head_dim=config.head_dim, dtype=options.base_dtype
    )
    attention = plan_for(options.attention_mode, spec)
    with torch.device("meta"):
        model = WanModel(config, registry.detect(checkpoint.shapes))
    report = _fill(model, checkpoint, plan, [file for file in options.loras if file.merge])
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
        attention=attention,
        attention_spec=spec,
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


def _fill(model: WanModel, checkpoint: Checkpoint, plan: Plan, loras: Sequence[LoraFile]) -> LoadReport:
    names = {name: name for name, _ in model.named_parameters()}
    report = check(model, checkpoint, names, what=TRANSFORMER)
    merged = MergedLoras(loras, model, checkpoint)
    with torch.no_grad():
        for name, plain in list(model.named_modules()):
            layer = plan.layer(checkpoint, name, plain, merged)
            if layer is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
        fill(model, checkpoint, names, dtype_of=lambda name: _dtype(name, checkpoint, plan.base))
        merged.add_to_others(model)
    describe(model)
    return report


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
    return replace(model, loras=tuple(files))
