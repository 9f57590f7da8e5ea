"""Putting a checkpoint's tensors into a module that was built on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.fp8_rows import padded_size
from ..kernels.nvfp4 import BLOCK
from ..tensor_layout import kernel_ready
from .checkpoint import Checkpoint
from .stored_formats import MXFP8_BLOCK

log = logging.getLogger("wanvideo")

DtypeOf = Callable[[str], torch.dtype]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How many tensors of the files were used, and the names of those that were not."""

    matched: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        rest = f"{len(self.unused)} unused (first '{self.unused[0]}')" if self.unused else "none unused"
        return f"{self.matched} tensors matched, none missing, {rest}"


def assign(
    model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], *, dtype: torch.dtype, what: str
) -> LoadReport:
    """Fill every parameter of `model`, in place, and log one line of what matched.

    names: parameter -> tensor of the checkpoint. Shapes may differ by dimensions of size 1, and by the zeros that fill
    NVFP4 and MXFP8 up. what: the kind of model, for messages. Raises ValueError, naming the first, if tensors are
    missing or do not fit.
    """
    report = check(model, checkpoint, names, what=what)
    fill(model, checkpoint, names, dtype_of=lambda name: dtype)
    return report


def check(
    model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], *, what: str, besides: Collection[str] = ()
) -> LoadReport:
    """The first half of `assign`: whether the tensors are there and fit, from the header alone, with the log line.

    besides: tensors that no parameter takes, but something else reads.
    """
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if names.get(name) not in checkpoint.shapes)
    if missing:
        modules = [file.path.name for file in checkpoint.files[1:]]
        cause = f"it is another kind of file or incomplete; choose a {what} file"
        if modules:
            cause = "one of these files is incomplete or not made for the other; choose another"
        raise ValueError(
            f"{' with '.join((checkpoint.path.name, *modules))} lacks {len(missing)} of the {len(wanted)} tensors of a "
            f"{what}, first '{missing[0]}': {cause}."
        )
    for name, parameter in wanted.items():
        shape = checkpoint.shapes[names[name]]
        if not _fits(shape, parameter.shape, checkpoint.formats[names[name]]):
            file = checkpoint.file_of(names[name]).path.name
            raise ValueError(
                f"{file}: '{names[name]}' has the shape {tuple(shape)} where a {what} has {tuple(parameter.shape)}; "
                "choose another file."
            )
    used = {names[name] for name in wanted} | set(besides)
    report = LoadReport(matched=len(wanted), unused=tuple(sorted(set(checkpoint.shapes) - used)))
    log.info("%s: %s, %s.", checkpoint.path.name, what, report)
    return report


def fill(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], *, dtype_of: DtypeOf) -> None:
    """The second half of `assign`: read the tensors of all parameters that are still on the meta device."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            dtype, key = dtype_of(name), names[name]
            value = read(checkpoint, key, parameter.shape, mapped=checkpoint.dtypes[key] != dtype)
            state[name] = kernel_ready(value.to(dtype), strided=False)
    model.load_state_dict(state, assign=True, strict=False)
    model.eval().requires_grad_(False)


def read(checkpoint: Checkpoint, name: str, shape: torch.Size, *, mapped: bool = False) -> Tensor:
    """The tensor `name` in the model's shape, which `check` has found to fit. mapped: see `TensorFile.read`."""
    value = checkpoint.tensor(name, mapped=mapped)
    if value.numel() != shape.numel():
        value = value[: shape[0], : shape[1]]
    return value.reshape(shape)


def _fits(stored: Sequence[int], wanted: Sequence[int], form: str) -> bool:
    if [size for size in stored if size != 1] == [size for size in wanted if size != 1]:
        return True
    if form not in ("NVFP4", "MXFP8") or len(wanted) != 2 or len(stored) != 2:
        return False
    # A kernel reads whole blocks of columns; ComfyUI fills rows up too, and FP8 products want 32 columns.
    (rows, columns), (n, k) = stored, wanted
    row_multiple = BLOCK if form == "NVFP4" else MXFP8_BLOCK
    return rows in (n, padded_size(n, row_multiple)) and columns in (padded_size(k, BLOCK), padded_size(k))


def layer_count(keys: Mapping[str, object], prefix: str) -> int:
    """How many numbered layers follow `prefix` in the keys: 1 + the largest number, 0 if there is none."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def head_count(checkpoint: Checkpoint, width: int, head_size: int) -> int:
    """Attention heads: from the header field `wanvideo.num_heads`, else width / head_size.

    Raises ValueError if neither gives a whole number.
    """
    stated = checkpoint.metadata.get("wanvideo.num_heads")
    if stated is not None:
        return int(stated)
    if width % head_size:
        raise ValueError(
            f"{checkpoint.path.name} is {width} channels wide, which heads of {head_size} do not fill: state the "
            "number of heads in the header field wanvideo.num_heads."
        )
    return width // head_size
