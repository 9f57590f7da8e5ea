"""How much attention each query pays to each of a few classes of keys, over all heads.

As an attention call it is one whose values are the masks, padded to 8 columns, for which kernels of 128 columns leave
half of their work undone and little of its time. The kernel here computes scores, exponentials and their sums alone. On
the CPU, and where it does not run, the operator is that call: eager PyTorch.

Shapes: B batch, L queries, S keys, H heads, D head size, N classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs

# cuDNN takes values of 8 columns or a multiple.
COLUMNS = 8
# Of the kernel: one of its columns is that of all keys. Older GPUs have too little shared memory for its tiles.
MOST_CLASSES = 7
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128)
AMPERE = (8, 0)


def class_attention(q: Tensor, k: Tensor, masks: Tensor) -> Tensor:
    """Attention to the keys of each class, mean over heads: [B, L, N] float32.

    q [B, L, H, D], k [B, S, H, D]; masks [N, S] of 0 and 1, which may overlap. Differentiable when gradients are on.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return class_attention_eager(q, k, masks)
    return _class_attention_op(q, k, masks)


def class_attention_eager(q: Tensor, k: Tensor, masks: Tensor) -> Tensor:
    """What the kernel must equal."""
    classes = len(masks)
    values = F.pad(masks.t(), (0, -classes % COLUMNS)).to(q.dtype)
    values = values.expand(*q.shape[0:3:2], *values.shape).contiguous()
    shares = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), values)
    return shares[..., :classes].float().mean(dim=1)


@torch.library.custom_op(op_name("class_attention"), mutates_args=())
def _class_attention_op(q: Tensor, k: Tensor, masks: Tensor) -> Tensor:
    q, k = kernel_ready(q), kernel_ready(k)
    check_entry("class_attention", q=q, k=k)
    if not _has_kernel(q, masks):
        return class_attention_eager(q, k, masks)
    shares = torch.empty((q.shape[0], q.shape[2], q.shape[1], len(masks)), dtype=torch.float32, device=q.device)
    triton_kernels("class_attention_triton").class_shares(q, k, masks, shares)
    return shares.mean(dim=1)


@_class_attention_op.register_fake
def _(q: Tensor, k: Tensor, masks: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], len(masks)), dtype=torch.float32)


def _has_kernel(q: Tensor, masks: Tensor) -> bool:
    fits = q.dtype in DTYPES and q.shape[-1] in HEAD_SIZES and len(masks) <= MOST_CLASSES
    if not fits or not q.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(q.device) >= AMPERE and triton_runs(q.device)
