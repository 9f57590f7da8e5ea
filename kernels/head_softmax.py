"""Softmax of attention scores that lie key by key, all heads of a key beside each other.

A product with few keys gives a query's scores of all heads in one row. torch's softmax along an axis that is not the
last takes several times the time to move them; the kernel is one pass, in place. On the CPU, and where Triton does not
run, the operator is eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs


def head_softmax(scores: Tensor, bias: Tensor, gain: Tensor, heads: int) -> None:
    """Softmax of scores + bias over the keys, times gain, in the memory of the scores and rounded once.

    scores [B, L, T * H], contiguous, T keys outside H heads; bias [B, T * H] float32; gain 0-d float32. Raises
    ValueError for scores that are not contiguous.
    """
    _head_softmax_op(scores, bias, gain, heads)


def head_softmax_eager(scores: Tensor, bias: Tensor, gain: Tensor, heads: int) -> None:
    """What the kernel must equal."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    total = scores.to(wide) + bias.to(wide).unsqueeze(1)
    scores.copy_((total.unflatten(-1, (-1, heads)).softmax(dim=-2) * gain).flatten(-2))


@torch.library.custom_op(op_name("head_softmax"), mutates_args=("scores",))
def _head_softmax_op(scores: Tensor, bias: Tensor, gain: Tensor, heads: int) -> None:
    if not scores.is_contiguous():
        raise ValueError(f"Scores of strides {scores.stride()} are not contiguous: they are changed where they lie.")
    if not scores.is_cuda or scores.dtype == torch.float64 or not triton_runs(scores.device):
        head_softmax_eager(scores, bias, gain, heads)
        return
    bias, gain = kernel_ready(bias.float(), strided=False), kernel_ready(gain.float())
    check_entry("head_softmax", strided=False, scores=scores, bias=bias, gain=gain)
    triton_kernels("head_softmax_triton").head_softmax(scores, bias, gain, heads)


@_head_softmax_op.register_fake
def _(scores: Tensor, bias: Tensor, gain: Tensor, heads: int) -> None:
    return None
