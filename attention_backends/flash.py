"""FlashAttention 2 and 3 (Dao 2023, Shah et al. 2024; packages `flash-attn`, and
`flash_attn_interface` or `fa3-fwd`)."""

from __future__ import annotations

import torch

from . import packages
from .contract import AttentionSpec, Backend
from .third_party import Kernel, backend_of, register

LARGEST_HEAD = 256
# Built from its authors' source, or of the wheel `fa3-fwd`, which has the forward pass in bfloat16 and FP8.
WHEEL = ("fa3_fwd_interface", "flash_attn_func")
FLASH_3_EXPORTS = (("flash_attn_interface", "flash_attn_func"), WHEEL)
TWO = register(Kernel(name="flash_attn_2", exports=(("flash_attn", "flash_attn_func"),), keeps_k=True))
THREE = register(Kernel(name="flash_attn_3", exports=FLASH_3_EXPORTS, keeps_k=True))


def _head_size(spec: AttentionSpec) -> str | None:
    if spec.head_dim > LARGEST_HEAD or spec.head_dim % 8:
        return f"it takes heads of up to {LARGEST_HEAD} channels in steps of 8, and this model's have {spec.head_dim}"
    return None


def _head_size_and_precision(spec: AttentionSpec) -> str | None:
    if spec.dtype == torch.float16 and packages.found(FLASH_3_EXPORTS) == WHEEL:
        return "the wheel fa3-fwd has no kernels for float16: choose base_precision bf16"
    return _head_size(spec)


FLASH_2 = Backend(
    runs="FlashAttention 2, 16-bit",
    make=backend_of(TWO, "flash_attn_2"),
    exports=TWO.exports,
    least=(8, 0),
    extra=_head_size,
    get="pip install flash-attn",
)
FLASH_3 = Backend(
    runs="FlashAttention 3, 16-bit",
    make=backend_of(THREE, "flash_attn_3"),
    exports=THREE.exports,
    only=((9, 0),),
    extra=_head_size_and_precision,
    get="pip install fa3-fwd",
)
