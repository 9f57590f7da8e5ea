"""Attention functions of optional packages, behind one opaque operator that keeps their contracts.

Each is handed kernel-ready tensors in its own layout and, unless it is known to leave its arguments alone, a K of its
own: SageAttention 1 and 3 subtract K's mean in place. What comes back is dense, [B, L, H, D], in the caller's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import check_entry, kernel_ready
from . import packages
from .contract import AttentionSpec

# What these kernels compute in; other activations are rounded to the first of them.
DTYPES = (torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """The sizes of a call: tokens of q and of k, heads, and where it runs."""

    queries: int
    keys: int
    heads: int
    device: torch.device


def _no_limit(sizes: Sizes) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A third-party attention function.

    exports: where it is found, the first that imports is used. heads_first: it takes [B, H, L, D] instead of
    [B, L, H, D]; packed: it takes [B * L, H, D] and where sequences start; keeps_k: it never writes to K; options: what
    it is called with; limit: says why it may not be called at these sizes.
    """

    name: str
    exports: tuple[packages.Export, ...]
    heads_first: bool = False
    packed: bool = False
    keeps_k: bool = False
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    limit: Callable[[Sizes], str | None] = _no_limit

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, L, H, D] -> [B, L, H, D]. Raises ValueError above the kernel's limits."""
        refused = self.limit(Sizes(q.shape[1], k.shape[1], q.shape[2], q.device))
        if refused is not None:
            raise ValueError(f"The kernel '{self.name}' cannot run here: {refused}; choose another attention_mode.")
        dtype = q.dtype if q.dtype in DTYPES else DTYPES[0]
        ready_q, ready_k, ready_v = (self._argument(t.to(dtype)) for t in (q, k, v))
        if not self.keeps_k and ready_k.untyped_storage().data_ptr() == k.untyped_storage().data_ptr():
            ready_k = ready_k.clone()
        check_entry(self.name, strided=False, q=ready_q, k=ready_k, v=ready_v)
        # Triton and some of these packages launch on the current device, wherever the tensors are.
        with torch.cuda.device_of(q):
            out = self._call(ready_q, ready_k, ready_v, q.shape[1], k.shape[1])
        out = out[0] if isinstance(out, tuple) else out
        out = out.transpose(1, 2) if self.heads_first else out.reshape(*q.shape[:3], v.shape[3])
        return kernel_ready(out.to(q.dtype), strided=False)

    def _argument(self, t: Tensor) -> Tensor:
        return kernel_ready(t.transpose(1, 2) if self.heads_first else t, strided=False)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, queries: int, keys: int) -> Tensor | tuple[Tensor, ...]:
        function = packages.load(self.exports)
        if not self.packed:
            return function(q, k, v, **self.options)
        starts = (_starts(q.shape[0], count, q.device) for count in (queries, keys))
        return function(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *starts, queries, keys, **self.options)


def _starts(batch: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * count, count, dtype=torch.int32, device=device)


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Make a kernel known to the operator, by its name."""
    KERNELS[kernel.name] = kernel
    return kernel


@torch.library.custom_op(op_name("third_party_attention"), mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return KERNELS[kernel].run(q, k, v)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@dataclass(frozen=True)
class ThirdParty:
    """A backend that is one third-party kernel."""

    name: str
    kernel: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v. Raises ValueError for a mask."""
        refuse_mask(self.name, mask)
        return _op(q, k, v, self.kernel.name)


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """Raise ValueError for a mask that would otherwise be ignored."""
    if mask is not None:
        raise ValueError(f"attention_mode '{name}' takes no mask: choose 'sdpa' for attention under a mask.")


def backend_of(kernel: Kernel, name: str) -> Callable[[AttentionSpec], ThirdParty]:
    """A row's `make` for this kernel under the option's name."""
    return lambda spec: ThirdParty(name, kernel)
