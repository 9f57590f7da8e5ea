"""The layout contract of kernel arguments.

GPU kernels read 16 bytes at a time. A tensor is kernel-ready when its last dimension is dense, its address is a
multiple of 16 and every other stride is a multiple of 16 bytes (or, for kernels that take no strides, it is
contiguous). `.contiguous()` is not that rule: a contiguous view that starts one element into its storage is returned
unchanged, and the kernel then fails with "CUDA error: misaligned address".

Addresses do not exist while a graph is traced, so `kernel_ready` runs inside opaque ops and at load; `dense` is for
traced code.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16


def is_kernel_ready(t: Tensor, strided: bool = True) -> bool:
    """Whether `t` obeys the rule; `strided=False` asks for a contiguous tensor. Dimensions of size 1 are ignored."""
    if t.numel() == 0:
        return True
    if t.data_ptr() % ALIGNMENT:
        return False
    if not strided:
        return t.is_contiguous()
    last = t.dim() - 1
    for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if size == 1:
            continue
        if axis == last:
            if stride != 1:
                return False
        elif stride == 0 or stride * t.element_size() % ALIGNMENT:
            return False
    return True


def kernel_ready(t: Tensor, strided: bool = True) -> Tensor:
    """`t` itself when it is ready, else a fresh copy: rows padded to 16 bytes, or contiguous with `strided=False`."""
    if is_kernel_ready(t, strided):
        return t
    if not strided or t.dim() < 2:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
    step = max(ALIGNMENT // t.element_size(), 1)
    pitch = -(-t.shape[-1] // step) * step
    padded = torch.empty((*t.shape[:-1], pitch), dtype=t.dtype, device=t.device)
    return padded.narrow(-1, 0, t.shape[-1]).copy_(t)


def dense(t: Tensor) -> Tensor:
    """`t` with a dense last dimension, decided from shape and strides alone (safe while a graph is traced)."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()
