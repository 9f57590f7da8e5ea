"""NaN and infinity in what users connect: named before a model runs on it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; takes no memory beside the tensor, whatever its length."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    # Extremes carry NaN and infinity along. Types of 8 bits have no extremes.
    low, high = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(what: str, tensor: Tensor, *, unit: str = "") -> None:
    """Raise ValueError that begins with `what` ("The pictures hold") if the tensor holds NaN or infinity.

    unit: what the first dimension counts, to name where the first such value is.
    """
    if is_finite(tensor):
        return
    place = ""
    if unit:
        place = f" (first in {unit} {next(i for i, part in enumerate(tensor) if not is_finite(part))})"
    raise ValueError(f"{what} NaN or infinity{place}: look at the node or the file that they come from.")
