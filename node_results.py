"""Pictures and masks that nodes hand on lie where those of other nodes do, so that one can be joined to the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger("wanvideo")

SHARED_KINDS = ("IMAGE", "MASK")


def placed(kinds: Sequence[object], results: object, device: torch.device, node: str) -> object:
    """The results of a node with pictures and masks on `device`, or in main memory, told, where it has no room.

    kinds: the node's RETURN_TYPES. node: for messages. What is no tuple comes back as it is.
    """
    if device.type == "cpu" or not isinstance(results, tuple):
        return results
    return tuple(
        _moved(result, device, node) if kind in SHARED_KINDS and isinstance(result, Tensor) else result
        for kind, result in zip(kinds, results, strict=True)
    )


def _moved(result: Tensor, device: torch.device, node: str) -> Tensor:
    try:
        return result.to(device)
    except torch.OutOfMemoryError:
        log.warning(
            "What %s gives stays in main memory: %s has no room for %.1f GiB; start ComfyUI without --gpu-only.",
            node, device, result.nbytes / 2**30,
        )  # fmt: skip
        return result
