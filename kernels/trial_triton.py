"""The smallest Triton kernel, to find out whether there is a compiler for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _one(out):
    tl.store(out, 1.0)


def run(device: torch.device) -> None:
    """Compiles and runs it there. Raises whatever stops it."""
    with torch.cuda.device(device):
        _one[(1,)](torch.empty(1, device=device))
