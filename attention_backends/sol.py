"""Sol-Attn: sparse attention without training, from comfy-kitchen (arXiv 2607.24027).

Each block of 64 queries attends exactly to the key blocks that a threshold routes to it, and to a pooled term for each
of the others. It is an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy_kitchen
import torch
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import check_entry, kernel_ready
from .contract import AttentionSpec, Backend
from .third_party import DTYPES, refuse_mask

HEAD_DIMS = (128,)


@torch.library.custom_op(op_name("sol_attn"), mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = q.dtype if q.dtype in DTYPES else DTYPES[0]
    ready = [kernel_ready(t.to(dtype), strided=False) for t in (q, k, v)]
    check_entry("sol_attn", strided=False, q=ready[0], k=ready[1], v=ready[2])
    # It launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(q):
        return kernel_ready(comfy_kitchen.sol_attn(*ready).to(q.dtype), strided=False)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class SolAttention:
    """Sparse self-attention of q, k, v of one shape."""

    name: str = "sol_attn"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v. Raises ValueError for a mask, and for q, k, v of different shapes."""
        refuse_mask(self.name, mask)
        if not q.shape == k.shape == v.shape:
            raise ValueError(
                "attention_mode 'sol_attn' takes as many keys as queries: choose 'sdpa' for this workflow."
            )
        return _op(q, k, v)


def _kernel(spec: AttentionSpec) -> str | None:
    if comfy_kitchen.sol_attn_is_available(spec.device):
        return None
    return "comfy-kitchen has no Sol-Attn kernel for this device (it needs its CUDA build and compute capability 8.0)"


SOL = Backend(
    runs="sparse attention of comfy-kitchen (Sol-Attn), an approximation",
    make=lambda spec: SolAttention(),
    exports=(("comfy_kitchen", "sol_attn"),),
    least=(8, 0),
    head_dims=HEAD_DIMS,
    extra=_kernel,
    get="pip install -U comfy-kitchen (with torch for CUDA 13)",
)
