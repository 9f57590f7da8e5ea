"""The layout contract of kernel arguments.

GPU kernels read 16 bytes at a time. A tensor is kernel-ready when its last dimension is dense, its address is a
multiple of 16 and every other stride is a multiple of 16 bytes (or, for kernels that take no strides, it is
contiguous). `.contiguous()` is not that rule: a contiguous view that starts one element into its storage is returned
unchanged, and the kernel then fails with "CUDA error: misaligned address".

Addresses do not exist while a graph is traced, so `kernel_ready` runs inside opaque ops and at load; `dense` is for
traced code. With the environment variable WAN_LAYOUT_CHECK=1 every kernel entry asserts the rule on what it hands to
the kernel, and names the module and the argument that breaks it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

ALIGNMENT = 16
CHECKING = os.environ.get("WAN_LAYOUT_CHECK", "0") == "1"

# Names of the modules that are running, outermost first; kept only in checking mode.
_running: list[str] = []


def is_kernel_ready(t: Tensor, strided: bool = True) -> bool:
    """Whether `t` obeys the rule; `strided=False` asks for a contiguous tensor, whatever its strides in bytes.

    Dimensions of size 1 are ignored, and an empty tensor is ready. A 0-d tensor needs only the address. A stride of 0
    (`expand`) is not ready. Of a column-major operand, hand over the [N, K] storage: its transposed view is not ready.
    """
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
    return t if t.dim() == 0 or t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def check_entry(kernel: str, *, strided: bool = True, **arguments: Tensor | None) -> None:
    """In checking mode, assert the rule for the arguments of a kernel that is about to run.

    Raises AssertionError that names the kernel, the module it runs for (see `watch`) and the argument.
    """
    if not CHECKING:
        return
    for name, t in arguments.items():
        if t is not None and not is_kernel_ready(t, strided):
            module = _running[-1] if _running else "no watched module"
            raise AssertionError(
                f"{kernel} in {module}: argument '{name}' is not kernel-ready: shape {tuple(t.shape)}, strides "
                f"{t.stride()}, {t.dtype}, address % {ALIGNMENT} = {t.data_ptr() % ALIGNMENT}."
            )


def watch(model: nn.Module) -> None:
    """In checking mode, let `check_entry` know the names of the model's modules. Blocks must run uncompiled for it."""
    if not CHECKING:
        return
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: _running.append(name or "the model"))
        module.register_forward_hook(lambda *_: _leave(), always_call=True)


def _leave() -> None:
    _running.pop()
