"""The FP8 attention that is fastest for the call's number of tokens, of those that run here.

In a forward on an H200 cuDNN's kernel is 3 % ahead where keys fill its tiles, its result being in FP8 already, and
level with FlashAttention 3's or a little behind where zeros must (docs/attention.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..kernels.fp8_rows import Fp8Rows
from .contract import AttentionSpec, Backend, FusedAttention, Projection
from .cudnn import CUDNN_FP8, TILE, CudnnFp8
from .flash_fp8 import FLASH_3_FP8, Flash3Fp8
from .fp8 import Fp8Attention

KERNELS: dict[str, Fp8Attention] = {kernel.name: kernel for kernel in (CudnnFp8(), Flash3Fp8())}
ROWS = {"cudnn_fp8": CUDNN_FP8, "fa3_fp8": FLASH_3_FP8}


@dataclass(frozen=True)
class AutoFp8(FusedAttention):
    """tiled: the option for a number of keys that fills cuDNN's tiles; other: for any other number."""

    tiled: str
    other: str
    name: str = "auto_fp8"

    def kernel(self, keys: int) -> Fp8Attention:
        """What runs with so many keys."""
        return KERNELS[self.other if keys % TILE else self.tiled]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """q, k, v [B, L, H, D], normalized and placed, -> [B, L, H, D] in v's dtype. Raises ValueError for a mask."""
        return self.kernel(k.shape[1])(q, k, v, mask=mask)

    def fused(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Tensor:
        """As the kernel's own."""
        return self.kernel(rope.shape[-3]).fused(q, k, v, norm_q, norm_k, rope)

    def fused_rows(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Fp8Rows:
        """As the kernel's own."""
        return self.kernel(rope.shape[-3]).fused_rows(q, k, v, norm_q, norm_k, rope)


def _made(spec: AttentionSpec) -> AutoFp8:
    able = [name for name, row in ROWS.items() if row.reason(spec) is None]
    return AutoFp8(tiled=able[0], other=able[-1])


def _why_not(spec: AttentionSpec) -> str | None:
    reasons = {name: row.reason(spec) for name, row in ROWS.items()}
    if None in reasons.values():
        return None
    return "none of its kernels can: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())


AUTO_FP8 = Backend(
    runs="cudnn_fp8 where tokens are a multiple of 256, else fa3_fp8; either alone where the other cannot run",
    make=_made,
    any_dtype=True,
    fused=True,
    extra=_why_not,
    get="pip install fa3-fwd nvidia-cudnn-frontend, on Hopper",
)
