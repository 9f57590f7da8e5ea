"""What a load will be, from the headers of its files and the loader's options: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..attention import AttentionSpec
from .architecture import config_of
from .assign import layer_count
from .attention_plan import AttentionPlan, plan_for
from .block_swap import BlockSwapArgs
from .checkpoint import Checkpoint, open_checkpoint
from .compilation import CompileArgs, refuse_unless_it_compiles
from .config import WanConfig
from .extension import Extension
from .families import Kind
from .lora import LoraFile, widening
from .lora_weights import take
from .quantization import Plan, plan_of, refuse_fp8_files
from .systems import Systems

if TYPE_CHECKING:
    from ..host import Host


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


class Contents(NamedTuple):
    """What the files of a model hold together.

    config: of the main file; channels: that the model reads in the end, more where a control LoRA widens it. main: the
    main file alone; checkpoint: with its modules. loras: the files that change layers.
    """

    config: WanConfig
    channels: int
    extensions: tuple[Extension, ...]
    main: Checkpoint
    checkpoint: Checkpoint
    loras: tuple[LoraFile, ...]


class LoadPlan(NamedTuple):
    """What `load_wan_model` will do."""

    contents: Contents
    quantization: Plan
    attention_spec: AttentionSpec
    attention: AttentionPlan


def contents(
    path: Path, options: LoadOptions, systems: Systems, *, reader: Callable[[Path], Checkpoint] = open_checkpoint
) -> Contents:
    """Read the headers. Raises ValueError for files of another kind, or that do not fit together."""
    return contents_of(reader(path), options, systems, reader=reader)


def contents_of(
    checkpoint: Checkpoint,
    options: LoadOptions,
    systems: Systems,
    *,
    reader: Callable[[Path], Checkpoint] = open_checkpoint,
) -> Contents:
    """A main file together with the modules and LoRAs of the options. Raises ValueError as `contents` does."""
    main = with_aliases(checkpoint, systems)
    config = config_of(main, systems)
    weights = take(options.loras, systems)
    for brought in weights.checkpoints:
        _check_layers(brought, config)
    modules = [_module(file, reader(file.path), config, systems) for file in options.modules]
    checkpoint = main.joined([*modules, *weights.checkpoints])
    loras, channels = widening.marked(weights.loras, config)
    extensions = weights.strengthened(systems.detect(_shapes(checkpoint, channels)))
    return Contents(config, channels, extensions, main, checkpoint, loras)


def planned(path: Path, options: LoadOptions, host: Host, systems: Systems) -> LoadPlan:
    """Read the headers and judge the options. Raises ValueError as `load_wan_model` does."""
    return options_applied(contents(path, options, systems), options, host)


def options_applied(files: Contents, options: LoadOptions, host: Host) -> LoadPlan:
    """How the options apply to what the files hold. Raises ValueError for an option that cannot run."""
    heads, head_dim = files.config.num_heads, files.config.head_dim
    spec = AttentionSpec(device=host.device(), heads=heads, head_dim=head_dim, dtype=options.base_dtype)
    quantization = plan_of(options.quantization, files.main, device=host.device(), base=options.base_dtype)
    refuse_fp8_files(files.checkpoint, host.device())
    refuse_unless_it_compiles(options.compile, host.device())
    return LoadPlan(files, quantization, spec, plan_for(options.attention_mode, spec))


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


def _module(file: ModuleFile, brought: Checkpoint, config: WanConfig, systems: Systems) -> Checkpoint:
    """What a transformer reads of a module file, under published names.

    Raises ValueError for another kind of file, or a module of another model.
    """
    checkpoint = with_aliases(brought, systems)
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
