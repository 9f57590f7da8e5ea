"""Models of a system's own, such as controlnets: loaded by a node of their own, run beside the transformer.

Their files are told by the `Kind` of the system's extension (`whole=True`). Layers take the plans of quantization.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..tensor_layout import watch
from .assign import check, fill
from .checkpoint import Checkpoint, open_checkpoint
from .families import Kind
from .lora import MergedLoras
from .quantization import Plan, describe
from .systems import Systems
from .turns import InTurns, Turns

if TYPE_CHECKING:
    from ..host import Host, Managed


@dataclass(frozen=True)
class OwnModel:
    """A loaded model and the file that it came from. options: what its loader chose, by which runs are told apart."""

    path: Path
    options: tuple[object, ...]
    managed: Managed = field(compare=False)

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self.managed.module


@dataclass(frozen=True)
class BesideModel(OwnModel):
    """One that runs beside the transformer, in turn with its blocks."""

    turns: Turns = field(compare=False)

    @contextmanager
    def held(self, *, streamed: bool) -> Iterator[None]:
        """Inside, the model has its place on the device; the host may still move it out for a larger one.

        streamed: its parts wait in main memory and come for their turns, copied ahead through two slabs.
        """
        self.turns.streamed = streamed
        self.managed.acquire()
        try:
            yield
        finally:
            self.managed.release()

    def turn(self, place: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside, the parts of this turn are on `device`, whether the model is held, was moved out, or never held."""
        return self.turns.visit(place, device)


def in_turns(module: InTurns, host: Host) -> tuple[Managed, Turns]:
    """The module under memory management, and where its parts are: the last two fields of a `BesideModel`."""
    turns = Turns(module, host.offload_device())
    return host.manage(module, place=turns, resident=turns.resident_bytes), turns


def open_own(path: Path, kind: Kind, systems: Systems) -> Checkpoint:
    """The header of a file of this kind. Raises ValueError, with the loader of what it is, for another kind."""
    checkpoint = open_checkpoint(path)
    actual = systems.kind_of(checkpoint.shapes)
    if actual is None or actual.name != kind.name:
        what = "an unknown kind of file" if actual is None else f"a {actual.name}"
        remedy = f"load it with '{actual.loader}'" if actual is not None and actual.loader else "choose another file"
        raise ValueError(f"{path.name} is {what}, not a {kind.name}; {remedy}.")
    return checkpoint


def load_own(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    what: str,
    plan_of: Callable[[str], Plan | None],
    dtype_of: Callable[[str], torch.dtype],
    host: Host,
) -> Managed:
    """`fill_own`, and put the module under memory management as a whole."""
    fill_own(module, checkpoint, what=what, plan_of=plan_of, dtype_of=dtype_of)
    return host.manage(module)


def fill_own(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    what: str,
    plan_of: Callable[[str], Plan | None],
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Fill a module that was built on the meta device.

    plan_of: of a linear layer's name, how it is quantized, None for not at all. dtype_of: of a parameter's name, its
    precision. Raises ValueError if tensors are missing or do not fit.
    """
    names = {name: name for name, _ in module.named_parameters()}
    check(module, checkpoint, names, what=what)
    nothing = MergedLoras((), module, checkpoint)
    for name, plain in list(module.named_modules()):
        plan = plan_of(name) if isinstance(plain, nn.Linear) else None
        layer = None if plan is None else plan.layer(checkpoint, name, plain, nothing, in_block=True)
        if layer is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, layer)
    fill(module, checkpoint, names, dtype_of=dtype_of)
    describe(module)
    watch(module)
