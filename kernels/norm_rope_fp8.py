"""Queries, keys and values of self-attention as an FP8 kernel reads them, queries and keys in one pass over memory.

Queries and keys: RMS norm over all heads, rotary position (`wanvideo/rope.py`), a shift of the keys, a Hadamard
rotation of every head, E4M3. None of it but the rounding changes attention: the shift is the same for all keys, so
softmax cancels it, and the rotation is orthonormal, so q.k stays. The rotation spreads a few large channels over all of
a head: the error of a score is that of its products, which would all sit in those channels (QuaRot, Ashkboos et al.
2024; SageAttention, Zhang et al. 2024, for the shift).

Scales are one a tensor, and never measured on q or k: E4M3 keeps the same relative precision over 15 powers of two,
so that a bound far above the values costs nothing while it saturates nothing. An RMS norm gives one: no head is longer
than sqrt(C) times the largest weight, no channel of a rotated head is larger than the head's length, and no shift by
the mean of some tokens more than doubles it. Values are multiplied by a power of two, which is exact.

Shapes: B batch, L tokens, H heads, D head size, C = H * D. Each operator is the eager PyTorch beside it on the CPU and
a Triton kernel on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels, triton_runs
from .rope import apply_rope

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINY = 1e-30
HEAD_SIZES = (64, 128)
# A prime, so that the sampled tokens do not share a row or column of the token grid.
SAMPLE = 251


def power_of_two(bound: Tensor) -> Tensor:
    """The smallest power of two by which values up to `bound`, float32, can be divided to fit E4M3."""
    _, exponent = torch.frexp(LARGEST / bound.clamp(min=TINY))
    return torch.ldexp(torch.ones_like(bound), 1 - exponent)


def rotated(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Heads [..., D] float32, less `shift`, times Sylvester's Hadamard matrix of 1 and -1, which lengthens by D ** 0.5.

    Sums and differences at distance 1, 2, 4 and so on. Those of neighbours are float32; the rest are float16, which
    must hold D times the largest value. Those of the shift are rounded to float16, too: a shift that all keys share may
    be any.
    """
    x = _step(x, 1) if shift is None else _step(x, 1) - _step(shift, 1).half()
    x, distance = x.half(), 2
    while distance < x.shape[-1]:
        x, distance = _step(x, distance), 2 * distance
    return x.float()


def _step(x: Tensor, distance: int) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
    return torch.stack((first + second, first - second), dim=-2).flatten(-3)


def sampled(tokens: int, device: torch.device) -> Tensor:
    """Indices of the tokens whose mean stands for that of all."""
    count = min(SAMPLE, tokens)
    return torch.arange(count, device=device) * tokens // max(count, 1)


def norm_rope_eager(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    """RMSNorm(x [B, L, C]) * weight [C], rotated by rope [L or (B, L), D/2, 2]: [B, L, H, D] float32."""
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return apply_rope(normed.unflatten(-1, (heads, -1)), rope)


def mean_eager(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    """Mean of the sampled tokens' `norm_rope_eager`: [B, C] float32."""
    index = sampled(x.shape[1], x.device)
    return norm_rope_eager(x[:, index], weight, rope[..., index, :, :], eps, heads).mean(1).flatten(1)


def norm_rope_fp8_eager(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, eps: float, heads: int
) -> tuple[Tensor, Tensor]:
    """Values E4M3 [B, L, H, D] and the scale [1] that multiplies them; shift [B, C] is subtracted after the rotation
    by position. What the kernel must equal."""
    y = norm_rope_eager(x, weight, rope, eps, heads)
    return _quantized(y, shift, weight.float().abs().amax().reshape(1) * math.sqrt(x.shape[-1]))


def rotate_fp8_eager(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of heads x [B, L, H, D] that are normalized and placed already: the bound is that of x itself."""
    return _quantized(x.float(), shift, _largest(x) * math.sqrt(x.shape[-1]))


def tensor_fp8_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values E4M3 of x [...] and their scale [1]."""
    scale = power_of_two(_largest(x))
    return _fp8(x.float() / scale), scale


def _quantized(y: Tensor, shift: Tensor | None, bound: Tensor) -> tuple[Tensor, Tensor]:
    longer = y.shape[-1] ** 0.5
    scale = power_of_two(bound * longer * (1 if shift is None else 2))
    shift = None if shift is None else shift.view(y.shape[0], 1, *y.shape[2:]) / scale
    return _fp8(rotated(y / scale, shift)), scale / longer


def _fp8(y: Tensor) -> Tensor:
    return y.clamp(-LARGEST, LARGEST).to(FP8)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of x, [1] float32, in one pass over its bytes."""
    if x.numel() == 0:
        return torch.zeros(1, device=x.device)
    return torch.linalg.vector_norm(x, ord=math.inf, dtype=torch.float32).reshape(1)


@torch.library.custom_op(op_name("norm_rope"), mutates_args=())
def norm_rope(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    """The operator of `norm_rope_eager`, rounded to x's dtype: for attention in base precision.

    It is eager PyTorch where Triton does not run too, as nothing but speed depends on it.
    """
    if not x.is_cuda or not _has_kernel(x, heads):
        return norm_rope_eager(x, weight, rope, eps, heads).to(x.dtype)
    x, weight, rope = _ready("norm_rope", x, weight, rope)
    out = torch.empty((*x.shape[:2], heads, x.shape[-1] // heads), dtype=x.dtype, device=x.device)
    triton_kernels("norm_rope_fp8_triton").norm_rope(x, weight, rope, out, eps=eps)
    return out


@torch.library.custom_op(op_name("rope_heads"), mutates_args=())
def rope_heads(x: Tensor, turns: Tensor) -> Tensor:
    """The operator of `apply_rope` on heads x [B, L, H, D], turned by `turns` [L or (B, L), D/2, 2].

    One pass over memory where the eager form, in float32, takes more than ten.
    """
    if not x.is_cuda or not _has_kernel(x.flatten(2), x.shape[2]):
        return apply_rope(x, turns).contiguous()
    rows, turns = kernel_ready(x.flatten(2)), kernel_ready(turns, strided=False)
    check_entry("rope_heads", x=rows)
    check_entry("rope_heads", strided=False, turns=turns)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels("norm_rope_fp8_triton").rope_heads(rows, turns, out)
    return out


@torch.library.custom_op(op_name("norm_rope_mean"), mutates_args=())
def norm_rope_mean(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    """The operator of `mean_eager`: a shift that makes keys small, at the cost of a few tokens."""
    if not x.is_cuda:
        return mean_eager(x, weight, rope, eps, heads)
    x, weight, rope = _ready("norm_rope_mean", x, weight, rope)
    shape = (x.shape[0], min(SAMPLE, x.shape[1]), heads, x.shape[-1] // heads)
    placed = torch.empty(shape, dtype=torch.float32, device=x.device)
    triton_kernels("norm_rope_fp8_triton").norm_rope(x, weight, rope, placed, eps=eps)
    return placed.mean(1).flatten(1)


@torch.library.custom_op(op_name("norm_rope_fp8"), mutates_args=())
def norm_rope_fp8(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, eps: float, heads: int, room: int | None = None
) -> tuple[Tensor, Tensor]:
    """The operator of `norm_rope_fp8_eager`; zeros behind the L tokens, up to `room`.

    Raises ValueError for a head size that is not 64 or 128.
    """
    _check_size(x.shape[-1] // heads)
    if not x.is_cuda:
        return _filled_up(norm_rope_fp8_eager(x, weight, rope, shift, eps, heads), room)
    x, weight, rope = _ready("norm_rope_fp8", x, weight, rope)
    shift = None if shift is None else kernel_ready(shift, strided=False)
    check_entry("norm_rope_fp8", strided=False, shift=shift)
    values, scale = _room(x.unflatten(2, (heads, -1)), room)
    triton_kernels("norm_rope_fp8_triton").norm_rope_fp8(x, weight, rope, shift, values, scale, eps=eps)
    return values, scale


@torch.library.custom_op(op_name("rotate_fp8"), mutates_args=())
def rotate_fp8(x: Tensor, shift: Tensor | None, room: int | None = None) -> tuple[Tensor, Tensor]:
    """The operator of `rotate_fp8_eager`; room and errors as of `norm_rope_fp8`."""
    _check_size(x.shape[-1])
    if not x.is_cuda:
        return _filled_up(rotate_fp8_eager(x, shift), room)
    rows = kernel_ready(x.flatten(2))
    shift = None if shift is None else kernel_ready(shift, strided=False)
    check_entry("rotate_fp8", x=rows)
    check_entry("rotate_fp8", strided=False, shift=shift)
    values, scale = _room(x, room)
    triton_kernels("norm_rope_fp8_triton").rotate_fp8(rows, _largest(x), shift, values, scale)
    return values, scale


@torch.library.custom_op(op_name("tensor_fp8"), mutates_args=())
def tensor_fp8(x: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
    """The operator of `tensor_fp8_eager` on x [B, L, H, D]; room as of `norm_rope_fp8`."""
    if not x.is_cuda:
        return _filled_up(tensor_fp8_eager(x), room)
    x = kernel_ready(x, strided=False)
    check_entry("tensor_fp8", strided=False, x=x)
    values, scale = _room(x, room)
    triton_kernels("norm_rope_fp8_triton").tensor_fp8(x, _largest(x), values, scale)
    return values, scale


@torch.library.custom_op(op_name("expand_fp8"), mutates_args=())
def expand_fp8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 values [...] times their scale [1], in `dtype`."""
    if not values.is_cuda:
        return (values.float() * scale).to(dtype)
    values = kernel_ready(values, strided=False)
    check_entry("expand_fp8", strided=False, values=values)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    triton_kernels("norm_rope_fp8_triton").expand_fp8(values, scale, out)
    return out


@norm_rope.register_fake
def _(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    return x.new_empty((*x.shape[:2], heads, x.shape[-1] // heads))


@rope_heads.register_fake
def _(x: Tensor, turns: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@norm_rope_mean.register_fake
def _(x: Tensor, weight: Tensor, rope: Tensor, eps: float, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)


@norm_rope_fp8.register_fake
def _(
    x: Tensor, weight: Tensor, rope: Tensor, shift: Tensor | None, eps: float, heads: int, room: int | None = None
) -> tuple[Tensor, Tensor]:
    return _room(x.unflatten(2, (heads, -1)), room)


@rotate_fp8.register_fake
def _(x: Tensor, shift: Tensor | None, room: int | None = None) -> tuple[Tensor, Tensor]:
    return _room(x, room)


@tensor_fp8.register_fake
def _(x: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
    return _room(x, room)


@expand_fp8.register_fake
def _(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device)


def _ready(kernel: str, x: Tensor, weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments as the kernels read them: x by rows, the pairs of rope as one block."""
    x, weight, rope = kernel_ready(x), kernel_ready(weight), kernel_ready(rope, strided=False)
    check_entry(kernel, x=x, weight=weight)
    check_entry(kernel, strided=False, rope=rope)
    return x, weight, rope


def _room(x: Tensor, room: int | None) -> tuple[Tensor, Tensor]:
    """Where heads x [B, L, H, D] and their scale go: [B, room or L, H, D], zero behind the first L."""
    batch, tokens, *head = x.shape
    values = torch.empty((batch, room or tokens, *head), dtype=FP8, device=x.device)
    values[:, tokens:].view(torch.uint8).zero_()
    return values, torch.empty(1, dtype=torch.float32, device=x.device)


def _filled_up(quantized: tuple[Tensor, Tensor], room: int | None) -> tuple[Tensor, Tensor]:
    values, scale = quantized
    if room is None:
        return quantized
    missing = room - values.shape[1]
    return F.pad(values.view(torch.uint8), (0, 0, 0, 0, 0, missing)).view(FP8), scale


def _has_kernel(x: Tensor, heads: int) -> bool:
    size = x.shape[-1] // heads
    return x.dtype != torch.float64 and size & (size - 1) == 0 and triton_runs(x.device)


def _check_size(size: int) -> None:
    if size not in HEAD_SIZES:
        raise ValueError(f"FP8 attention rotates heads of {HEAD_SIZES[0]} or {HEAD_SIZES[1]} channels, not {size}.")
