"""The attention that ComfyUI itself uses, as its command line chose it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..host import get_host
from ..kernels import op_name
from ..tensor_layout import check_entry, kernel_ready
from .contract import AttentionSpec, Backend
from .third_party import refuse_mask


@torch.library.custom_op(op_name("host_attention"), mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Whatever ComfyUI runs here may change K in place.
    ready = [kernel_ready(t.transpose(1, 2), strided=False) for t in (q, k.clone(), v)]
    check_entry("comfy", strided=False, q=ready[0], k=ready[1], v=ready[2])
    # As some of the packages that it may be do, it may launch on the current device, wherever the tensors are.
    with torch.cuda.device_of(q):
        return kernel_ready(get_host().attention()(*ready).unflatten(-1, (q.shape[2], v.shape[3])), strided=False)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@dataclass(frozen=True)
class ComfyAttention:
    """ComfyUI's optimized attention."""

    name: str = "comfy"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v. Raises ValueError for a mask, which some of ComfyUI's kernels ignore."""
        refuse_mask(self.name, mask)
        return _op(q, k, v)


def _host(spec: AttentionSpec) -> str | None:
    return None if get_host().attention() is not None else "it is ComfyUI's own attention, and this is not ComfyUI"


COMFY = Backend(
    runs="what ComfyUI runs by its command line (--use-sage-attention, ...)",
    make=lambda spec: ComfyAttention(),
    extra=_host,
    any_dtype=True,
    get="run the workflow inside ComfyUI",
)
