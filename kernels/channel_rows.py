"""What lies between the convolutions of a VAE, one pass each: norm with SiLU, and the sum at a residual block's end.

Tensors are [1, C, T, H, W] with channels innermost (channels_last_3d), so that a pass goes along rows of channels. Both
add the bias of the convolution before them, which cuDNN's bfloat16 convolutions would add in a slow pass of its own.
Source: huggingface/diffusers (WanRMS_norm, WanResidualBlock). On the CPU, and where Triton does not run, the eager
PyTorch below.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_kernels, triton_runs

EPS = 1e-12


def norm_silu(x: Tensor, gain: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """silu(y / |y| * sqrt(C) * gain) into `out`, of y = x + bias and the length |y| of its rows of channels.

    gain [C] or [C, 1, 1, 1]; bias [C]. Raises ValueError for another memory layout.
    """
    rows, into = rows_of(x), rows_of(out)
    if _fast(x):
        triton_kernels("channel_rows_triton").norm_silu(rows, gain.flatten(), into, bias, eps=EPS)
    else:
        into.copy_(norm_silu_eager(rows, gain.flatten(), bias))


def add_biased(y: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """y + bias + other, in y's memory and rounded once. Raises ValueError for another memory layout."""
    rows, others = rows_of(y), rows_of(other)
    if _fast(y):
        triton_kernels("channel_rows_triton").add_biased(rows, bias, others)
    else:
        wide = _wide(y)
        rows.copy_(rows.to(wide) + bias.to(wide) + others.to(wide))
    return y


def norm_silu_eager(rows: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the kernel must equal: rows [..., C] -> the same shape."""
    wide = _wide(rows)
    value = rows.to(wide) if bias is None else rows.to(wide) + bias.to(wide)
    scale = math.sqrt(rows.shape[-1])
    return F.silu(F.normalize(value, dim=-1, eps=EPS) * (gain.to(wide) * scale)).to(rows.dtype)


def rows_of(x: Tensor) -> Tensor:
    """[1, C, T, H, W] as [1, T, H, W, C], dense. Raises ValueError where channels are not innermost."""
    rows = x.permute(0, 2, 3, 4, 1)
    if not rows.is_contiguous():
        raise ValueError("Channels are not innermost in memory: bring the tensor into channels_last_3d.")
    return rows


def _fast(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and triton_runs(x.device)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
