"""Putting a checkpoint's tensors into a module that was built on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .checkpoint import Checkpoint

log = logging.getLogger("wanvideo")

DtypeOf = Callable[[str], torch.dtype]


def assign(
    model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], *, dtype: torch.dtype | DtypeOf, what: str
) -> None:
    """Fill every parameter of `model`, in place, and log one line of what matched.

    names: parameter -> tensor of the checkpoint. Shapes may differ by dimensions of size 1. what: the kind of model,
    for messages. Raises ValueError, naming the first, if tensors are missing or do not fit.
    """
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if names.get(name) not in checkpoint.shapes)
    if missing:
        raise ValueError(
            f"{checkpoint.path.name} lacks {len(missing)} of the {len(wanted)} tensors of a {what}, first "
            f"'{missing[0]}': it is another kind of file or incomplete; choose a {what} file."
        )
    state = {}
    for name, parameter in wanted.items():
        value = checkpoint.tensor(names[name])
        if [s for s in value.shape if s != 1] != [s for s in parameter.shape if s != 1]:
            raise ValueError(
                f"{checkpoint.path.name}: '{names[name]}' has the shape {tuple(value.shape)} where a {what} has "
                f"{tuple(parameter.shape)}; choose another file."
            )
        target = dtype if isinstance(dtype, torch.dtype) else dtype(name)
        state[name] = value.reshape(parameter.shape).to(target)
    model.load_state_dict(state, assign=True, strict=False)
    model.eval().requires_grad_(False)
    unused = len(set(checkpoint.shapes) - {names[name] for name in wanted})
    log.info("%s: %s, %d tensors matched, %d unused.", checkpoint.path.name, what, len(wanted), unused)


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
