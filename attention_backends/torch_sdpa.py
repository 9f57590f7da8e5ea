"""torch's scaled dot product attention, behind an opaque operator that makes its arguments kernel-ready."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import ALIGNMENT, check_entry, kernel_ready


def _sdpa_bshd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [.., Lq, Lk], kernel-ready, with 16 bytes to read wherever the rows begin some.

    cuDNN reads two numbers at a time, and so behind the end of an odd row. The numbers that torch makes of a boolean
    mask end with the row, and the read goes to somebody else's memory.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    keys = mask.shape[-1]
    missing = -keys % (ALIGNMENT // mask.element_size())
    return kernel_ready(F.pad(mask, (0, missing))[..., :keys] if missing else mask)


@torch.library.custom_op(op_name("sdpa"), mutates_args=())
def _sdpa_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = kernel_ready(q), kernel_ready(k), kernel_ready(v)
    mask = mask if mask is None else added_mask(mask, q.dtype)
    check_entry("sdpa", q=q, k=k, v=v, mask=mask)
    out = _sdpa_bshd(q, k, v, mask)
    # An operator may not return one of its inputs, which a zero-copy transpose of v could be for a single key.
    return out if out.data_ptr() not in {q.data_ptr(), k.data_ptr(), v.data_ptr()} else out.clone()


@_sdpa_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _differentiable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same outside the operator, which has no gradient; copies that make an argument ready have one."""
    # While a graph is traced there are no addresses to look at.
    if torch.compiler.is_compiling():
        return _sdpa_bshd(q, k, v, mask)
    q, k, v = kernel_ready(q), kernel_ready(k), kernel_ready(v)
    mask = mask if mask is None else added_mask(mask, q.dtype)
    check_entry("sdpa", q=q, k=k, v=v, mask=mask)
    out = _sdpa_bshd(q, k, v, mask)
    # Kernels of the backward pass read the gradient, which comes from anywhere.
    out.register_hook(kernel_ready)
    return out


@dataclass(frozen=True)
class Sdpa:
    """The fastest kernel that torch has for the device: cuDNN on Hopper and newer."""

    name: str = "sdpa"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v; differentiable when gradients are on."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, mask)):
            return _differentiable(q, k, v, mask)
        return _sdpa_op(q, k, v, mask)
