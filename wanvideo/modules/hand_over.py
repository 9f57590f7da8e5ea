"""Chunks of video between host and device, copied while the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def to_device(chunk: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor, dense, on the device; a GPU gets it without making the host wait for what runs there."""
    if device.type != "cuda":
        return chunk.to(device).contiguous()
    return torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True).copy_(chunk).to(device, non_blocking=True)


def to_host(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks as float32 on the CPU; from a GPU each while the next one is computed, in pinned memory of its own."""
    before: tuple[Tensor, torch.cuda.Event] | None = None
    for chunk in chunks:
        if not chunk.is_cuda:
            yield chunk.float().cpu().contiguous()
            continue
        wide = chunk.float().contiguous()
        copy = torch.empty(wide.shape, pin_memory=True).copy_(wide, non_blocking=True)
        copied = torch.cuda.current_stream(chunk.device).record_event()
        if before is not None:
            yield _arrived(*before)
        before = copy, copied
    if before is not None:
        yield _arrived(*before)


def _arrived(copy: Tensor, copied: torch.cuda.Event) -> Tensor:
    copied.synchronize()
    return copy
