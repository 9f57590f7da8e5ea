"""From a checkpoint file to a model that the sampler can run.

header -> sizes and extensions -> module on the meta device -> LoRA merged and tensors assigned -> report.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..attention import AttentionSpec
from ..quantized.linear import QuantizedLinear
from ..tensor_layout import watch
from .assign import LoadReport, check, fill
from .attention_plan import AttentionPlan
from .block_swap import AUTOMATIC, BlockSwapArgs, Placement
from .checkpoint import Checkpoint
from .compilation import compiled
from .conditioning import Payload
from .config import WanConfig
from .families import TRANSFORMER
from .load_plan import LoadOptions, LoadPlan, planned
from .lora import LoraFile, MergedLoras, beside, widening
from .memory import Work, described, usual_work
from .modules.model import WanModel
from .opaque import Opaque
from .quantization import Plan, describe, say_what_is_overruled
from .systems import Systems

if TYPE_CHECKING:
    from ..host import Host, Managed

log = logging.getLogger("wanvideo")

# Layers that are made at the same time: one is copied to the device, one from it. More would cost memory on both.
AT_ONCE = 2
FULL_PRECISION = ("patch_embedding",)
KEPT_PRECISION = ("modulation", "norm")
# Seconds that the log mentions: a model that is there already takes less.
WORTH_TELLING = 0.2
TRIALS = "attention_kernels.json"


class Elsewhere(Protocol):
    """Processes that hold the weights of models, so that this one reads only headers."""

    def run(self, request: object, host: Host) -> tuple[dict[str, object], dict[str, object]]:
        """As the sampler: LATENT dicts of the result and of the last estimate of the clean latents."""


@dataclass(frozen=True, kw_only=True)
class WanVideoModel(Opaque):
    """A loaded transformer and how to run it (socket WANVIDEOMODEL). Copies share the weights.

    payloads: what nodes between loader and sampler condition every run of this copy on. elsewhere: who samples with it;
    None for this process. Otherwise the transformer is on the meta device. trials: the file of attention kernels that
    were tried and run.
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
    elsewhere: Elsewhere | None = None
    trials: Path | None = field(default=None, compare=False)
    _listeners: list[object] = field(default_factory=list, repr=False, compare=False)

    @property
    def config(self) -> WanConfig:
        """Sizes of the transformer."""
        return self.transformer.config

    @property
    def model(self) -> SimpleNamespace:
        """The transformer where nodes of other packs look for it, as in ComfyUI's ModelPatcher."""
        return SimpleNamespace(diffusion_model=self.transformer)

    @property
    def model_options(self) -> dict[str, object]:
        """None: nodes of other packs look for settings of the original pack here."""
        return {}

    @property
    def base_dtype(self) -> torch.dtype:
        """Precision of activations."""
        return self.options.base_dtype

    @property
    def device(self) -> torch.device:
        """Where it computes: that of the host when it was loaded."""
        return self.attention_spec.device

    @property
    def swapped(self) -> bool:
        """Whether blocks wait in main memory, or may."""
        return self.block_swap is not None and self.block_swap.waits

    def try_attention(self, latent_size: Sequence[int], batch: int) -> None:
        """Try the attention kernels on latents of this size (frames, height, width), before the model needs the memory.

        batch: how many passes share a forward. Raises ValueError where one fails.
        """
        self.attention.try_out(self.attention_spec, self.work(latent_size, batch).tokens, batch, kept=self.trials)

    def set_step(self, index: int, *, filled: bool = True) -> None:
        """Strengths of LoRAs beside the weights for the step that comes, counted from 0 in the run.

        filled: whether its payloads fill the channels that control LoRAs read.
        """
        for listener in self._listeners:
            listener.set_step(index, filled=filled)

    def work(self, latent_size: Sequence[int], batch: int) -> Work:
        """A forward of latents of this size (frames, height, width), `batch` of them at once."""
        sizes = zip(latent_size, self.config.patch_size, strict=True)
        return Work(math.prod(size // patch for size, patch in sizes), batch)

    @contextmanager
    def active(self, work: Work | None = None) -> Iterator[WanModel]:
        """The transformer on the compute device, with block swap, unmerged LoRAs and compilation; undone afterwards.

        work: the largest forward that comes, of 720p if it is not known: `blocks_to_swap` -1 and the size of pieces
        are chosen by it. Raises ShortOfMemoryError, with what would fit, where the device's memory does not suffice.
        """
        self.placement.swap, self.placement.work = self.block_swap, work or usual_work(self.config)
        self.placement.attention = self.attention.main
        # What runs beside weights may read these when it is attached.
        self.placement.overlaps = not self.loras
        try:
            began = time.perf_counter()
            device = self.managed.acquire(self.placement.working_bytes())
            taken = time.perf_counter() - began
            if taken > WORTH_TELLING:
                log.info("Bringing the transformer to %s took %.1f s.", device, taken)
            with self._running(device):
                yield self.transformer
        except torch.OutOfMemoryError as error:
            # The frames of the traceback hold the activations.
            traceback.clear_frames(error.__traceback__)
            raise self.placement.short_of_memory() from None
        finally:
            self.placement.overlaps = False
            self.placement.arrive()

    @contextmanager
    def _running(self, device: torch.device) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_fp16_accumulation(self.options.fp16_accumulation))
            if self.loras:
                listener = stack.enter_context(beside(self.transformer, self.loras, device, self.base_dtype))
                self._listeners.append(listener)
                stack.callback(self._listeners.remove, listener)
            stack.enter_context(self.transformer.attending(self.attention))
            stack.enter_context(self.placement.swapping(device))
            stack.enter_context(self.transformer.sparing(self.placement.at_once))
            stack.enter_context(compiled(self.transformer.stacks().values(), self.options.compile))
            yield


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


def load_wan_model(
    path: Path, options: LoadOptions, host: Host, systems: Systems, *, elsewhere: Elsewhere | None = None
) -> WanVideoModel:
    """Load a Wan transformer with the module files that belong to it. systems: those that it may have.

    elsewhere: who samples with it in the place of this process, which then reads no weights. Raises ValueError, in one
    sentence, if a file is of another kind or incomplete, or an option cannot run.
    """
    return build(planned(path, options, host, systems), options, host, elsewhere=elsewhere)


def build(
    plan: LoadPlan, options: LoadOptions, host: Host, *, elsewhere: Elsewhere | None = None
) -> WanVideoModel:
    """Load what was planned. elsewhere: see `load_wan_model`. Raises ValueError for an incomplete file."""
    files = plan.contents
    say_what_is_overruled(options.quantization, files.checkpoint)
    with torch.device("meta"):
        model = WanModel(files.config, files.extensions)
    if elsewhere is None:
        report = _fill(model, files.checkpoint, plan.quantization, [file for file in files.loras if file.merge])
    else:
        report = check(model, files.checkpoint, _names(model), what=TRANSFORMER)
    if files.channels > files.config.in_dim:
        widening.widen(model.patch_embedding, files.channels)
        model.config = replace(files.config, in_dim=files.channels)
    watch(model)
    placement = Placement(model, host.offload_device(), reserved=host.reserved_memory())
    placement.swap = options.block_swap or _swap_of(host)
    placement.attention = plan.attention.main
    managed = host.manage(model, place=placement, resident=placement.resident_bytes)
    if elsewhere is None:
        # On the CPU there is no memory of a GPU to plan with.
        if host.device().type != "cpu":
            log.info("%s", described(placement.footprint(), "81 frames of 1280x720"))
        if options.keep_on_device:
            managed.acquire()
            placement.leave_main_memory()
    return WanVideoModel(
        transformer=model,
        managed=managed,
        placement=placement,
        path=files.main.path,
        options=options,
        report=report,
        attention=plan.attention,
        attention_spec=plan.attention_spec,
        loras=tuple(file for file in files.loras if not file.merge),
        block_swap=placement.swap,
        elsewhere=elsewhere,
        trials=host.cache_dir() / TRIALS,
    )


def _names(model: WanModel) -> dict[str, str]:
    return {name: name for name, _ in model.named_parameters()}


def _swap_of(host: Host) -> BlockSwapArgs | None:
    """What the host's memory options ask for where the graph does not say."""
    mode = host.memory_mode()
    if mode == "normal" or host.device().type != "cuda":
        return None
    log.info("Blocks are swapped because of the host's option for little memory; WanVideoBlockSwap overrules it.")
    return BlockSwapArgs(blocks_to_swap=AUTOMATIC) if mode == "low" else BlockSwapArgs(share=1.0)


def _fill(model: WanModel, checkpoint: Checkpoint, plan: Plan, loras: Sequence[LoraFile]) -> LoadReport:
    names = _names(model)
    report = check(model, checkpoint, names, what=TRANSFORMER)
    merged = MergedLoras(loras, model, checkpoint)
    with torch.no_grad():
        for name, layer in _layers(model, checkpoint, plan, merged):
            if layer is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
        fill(model, checkpoint, names, dtype_of=lambda name: parameter_dtype(name, checkpoint, plan.base))
        merged.add_to_others(model)
    describe(model)
    return report


def _layers(
    model: WanModel, checkpoint: Checkpoint, plan: Plan, merged: MergedLoras
) -> Iterator[tuple[str, QuantizedLinear | None]]:
    """What replaces each linear layer. For a GPU the next ones are read while one is converted or copied back."""
    plain = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    @torch.no_grad()
    def made(name: str) -> QuantizedLinear | None:
        return plan.layer(checkpoint, name, plain[name], merged, in_block=quantizable(model, name))

    if plan.device.type != "cuda":
        yield from zip(plain, map(made, plain), strict=True)
        return
    at_work = torch.cuda.current_device()
    with ThreadPoolExecutor(AT_ONCE, initializer=torch.cuda.set_device, initargs=(at_work,)) as pool:
        yield from zip(plain, pool.map(made, plain), strict=True)


def quantizable(model: WanModel, name: str) -> bool:
    """Whether the layer of this name may be quantized: it lies in a block, and no system wants it in base precision."""
    kept = (part for extension in model.extensions for part in extension.high_precision)
    return name.startswith(tuple(f"{stack}." for stack in model.stacks())) and not any(
        f".{part}." in f".{name}." for part in kept
    )


def parameter_dtype(name: str, checkpoint: Checkpoint, base: torch.dtype) -> torch.dtype:
    """What a tensor that stays plain is stored as: norms and modulation as the file has them, the rest in `base`."""
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
