"""Self-attention in FP8: what its kernels share, from the projections to q, k and v in E4M3.

`kernels/norm_rope_fp8.py` says how q and k become so without losing accuracy. Nothing is kept from one call to the
next, and nothing waits for the device.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import in_a_line
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.norm_rope_fp8 import HEAD_SIZES, norm_rope_fp8, norm_rope_mean, rotate_fp8, sampled, tensor_fp8
from . import packages
from .contract import FusedAttention, Projection, dotted
from .third_party import refuse_mask

log = logging.getLogger("wanvideo")

LEAST_TRITON = (3, 4)
PROBE_TOKENS = 256

# Values [B, L, H, D] in E4M3 and the scale [1], float32, that multiplies them.
Quantized = tuple[Tensor, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fp8Attention(FusedAttention, Generic[Result]):
    """A kernel of FP8 attention. Not differentiable. Result: what the kernel itself gives."""

    name: str

    def room(self, keys: int) -> int:
        """How many keys the kernel is called with; those behind the others are zeros."""
        return keys

    @abstractmethod
    def attend(self, q: Quantized, k: Quantized, v: Quantized) -> Result:
        """The kernel's call."""

    @abstractmethod
    def wide(self, result: Result, dtype: torch.dtype) -> Tensor:
        """Its result as heads [B, L, H, D] in `dtype`."""

    @abstractmethod
    def rows(self, result: Result, dtype: torch.dtype) -> Fp8Rows:
        """Its result as FP8 rows [B, L, C] that stand for `dtype`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """q, k, v [B, L, H, D], normalized and placed, -> [B, L, H, D] in v's dtype. Raises ValueError for a mask."""
        refuse_mask(self.name, mask)
        shift, room = k[:, sampled(k.shape[1], k.device)].float().mean(1).flatten(1), self.room(k.shape[1])
        return self.wide(self.attend(rotate_fp8(q, None), rotate_fp8(k, shift, room), tensor_fp8(v, room)), v.dtype)

    def fused(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Tensor:
        """The same from projections q, k [B, L, C], which are normalized, placed and quantized in one pass.

        v [B, L, H, D]; norm_q, norm_k: RMS norms over C with `weight` and `eps`; rope [L or (B, L), D/2, 2].
        """
        return self.wide(*self._attended(q, k, v, norm_q, norm_k, rope))

    def fused_rows(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Fp8Rows:
        """The same as FP8 rows [B, L, C], which an output projection in FP8 reads without another rounding."""
        return self.rows(*self._attended(q, k, v, norm_q, norm_k, rope))

    def _attended(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> tuple[Result, torch.dtype]:
        """The kernel's result and the dtype of v. One projection is there in 16 bits at a time."""
        wide = v()
        heads, dtype, room = wide.shape[2], wide.dtype, self.room(wide.shape[1])
        values = tensor_fp8(wide, room)
        # Rebinding alone would free it only once the next one is made.
        del wide
        wide = k()
        shift = norm_rope_mean(wide, norm_k.weight, rope, norm_k.eps, heads)
        keys = norm_rope_fp8(wide, norm_k.weight, rope, shift, norm_k.eps, heads, room)
        del wide
        queries = norm_rope_fp8(q(), norm_q.weight, rope, None, norm_q.eps, heads)
        return self.attend(queries, keys, values), dtype


def rotation_reason(head_dim: int) -> str | None:
    """Why heads of that size cannot be rotated and rounded on the GPU; None where they can."""
    if head_dim not in HEAD_SIZES:
        return f"the model's heads have {head_dim} channels, and it needs {' or '.join(map(str, HEAD_SIZES))}"
    why = packages.trouble(("triton", "jit"))
    if why == packages.NOT_INSTALLED:
        return "the package 'triton' (on Windows 'triton-windows') is not installed; pip install triton"
    if why is not None:
        return f"the package 'triton' cannot be imported: {why}"
    version = _triton_version()
    if version < LEAST_TRITON:
        return f"Triton {dotted(version)} cannot compile its rotation, it needs {dotted(LEAST_TRITON)} (PyTorch 2.8)"
    return None


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def first_run(backend: Fp8Attention, device: torch.device, head_dim: int) -> str | None:
    """What goes wrong with a small call on that GPU, which is waited for; None where nothing does."""
    try:
        # Of its own: the numbers that others draw on the GPU are the same whether this has run or not.
        generator = torch.Generator(device).manual_seed(0)
        shape = (3, 1, PROBE_TOKENS, 2, head_dim)
        q, k, v = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        finite = bool(backend(q, k, v).isfinite().all())
    except torch.OutOfMemoryError:
        log.warning("'%s' was not tried: there was not enough free memory on the GPU.", backend.name)
        return None
    # Whatever stops a first small run (no kernel for the GPU, a Triton without a compiler) is the reason.
    except Exception as error:
        return f"a first small run failed with {in_a_line(error).rstrip('.')}"
    return None if finite else "a first small run gave numbers that are not finite"
