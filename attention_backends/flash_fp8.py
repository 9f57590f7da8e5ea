"""Self-attention in FP8 by FlashAttention 3 (Shah et al. 2024): E4M3 in, bfloat16 out, sums in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import op_name
from ..kernels.fp8_rows import Fp8Rows, quantize
from ..tensor_layout import check_entry, kernel_ready
from . import packages
from .contract import AttentionSpec, Backend
from .flash import FLASH_3_EXPORTS
from .fp8 import Fp8Attention, Quantized, first_run, rotation_reason


@dataclass(frozen=True)
class Flash3Fp8(Fp8Attention[Tensor]):
    """FlashAttention 3's FP8 attention; its result is bfloat16."""

    name: str = "fa3_fp8"

    def attend(self, q: Quantized, k: Quantized, v: Quantized) -> Tensor:
        """The kernel's call."""
        return _flash_3_fp8(q[0], k[0], v[0], q[1], k[1], v[1])

    def wide(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        """As it is, in that dtype."""
        return result.to(dtype)

    def rows(self, result: Tensor, dtype: torch.dtype) -> Fp8Rows:
        """Rounded with a scale a row, as the output projection would do."""
        return quantize(self.wide(result, dtype).flatten(2))


@torch.library.custom_op(op_name("flash_3_fp8"), mutates_args=())
def _flash_3_fp8(q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor, scale_v: Tensor) -> Tensor:
    """q, k, v [B, L, H, D] E4M3 with scales [1] that multiply them -> [B, Lq, H, D] bfloat16."""
    q, k, v = (kernel_ready(t, strided=False) for t in (q, k, v))
    # The kernel reads one for each video and head.
    each = q.shape[0], q.shape[2]
    scales = {
        "q_descale": kernel_ready(scale_q.expand(each), strided=False),
        "k_descale": kernel_ready(scale_k.expand(each), strided=False),
        "v_descale": kernel_ready(scale_v.expand(each), strided=False),
    }
    check_entry("flash_3_fp8", strided=False, q=q, k=k, v=v, **scales)
    with torch.cuda.device_of(q):
        out = packages.load(FLASH_3_EXPORTS)(q, k, v, **scales)
    # Older builds return the log-sum-exp too.
    return kernel_ready(out[0] if isinstance(out, tuple) else out, strided=False)


@_flash_3_fp8.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor, scale_v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)


def _why_not(spec: AttentionSpec) -> str | None:
    return rotation_reason(spec.head_dim) or first_run(Flash3Fp8(), spec.device, spec.head_dim)


FLASH_3_FP8 = Backend(
    runs="FlashAttention 3 in FP8, with norm, position and rounding of q and k in one pass",
    make=lambda spec: Flash3Fp8(),
    exports=FLASH_3_EXPORTS,
    only=((9, 0),),
    any_dtype=True,
    fused=True,
    extra=_why_not,
    get="pip install fa3-fwd, on Hopper",
)
