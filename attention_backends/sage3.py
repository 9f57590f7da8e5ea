"""SageAttention 3: FP4 attention for Blackwell (Zhang et al. 2025, thu-ml/SageAttention, `sageattention3_blackwell`).

Its kernel takes contiguous [B, H, L, D] in 16 bits, heads of 64 or 128, no mask, and changes K in place. Its correction
for the means of Q has one row a block of 128 queries with per_block_mean, else one row in all; its stride counts in
int32, so larger calls are refused before they reach it.
"""

from __future__ import annotations

from .contract import Backend
from .third_party import Kernel, Sizes, backend_of, register

# Wheels differ in what they call the module and the function.
EXPORTS = (
    ("sageattn3", "sageattn3_blackwell"),
    ("sageattn", "sageattn3_blackwell"),
    ("sageattn", "sageattn_blackwell"),
    ("sage3", "sageattn3_blackwell"),
)
BLACKWELL = ((12, 0), (12, 1))
HEAD_DIMS = (64, 128)
# One mean for all queries: 12 MB instead of 7 GB at 75,600 tokens of 40 heads.
PER_BLOCK_MEAN = False
QUERY_BLOCK = 128
LARGEST_STRIDE = 2**31 - 1


def correction_stride(heads: int, queries: int, keys: int, per_block_mean: bool) -> int:
    """Elements of one batch entry of the kernel's correction: heads * rows * keys, both rounded up to blocks."""
    rows = -(-queries // QUERY_BLOCK) if per_block_mean else 1
    return heads * rows * -(-keys // QUERY_BLOCK) * QUERY_BLOCK


def stride_limit(sizes: Sizes) -> str | None:
    """Why the kernel's int32 stride would overflow at these sizes."""
    stride = correction_stride(sizes.heads, sizes.queries, sizes.keys, PER_BLOCK_MEAN)
    if stride > LARGEST_STRIDE:
        return f"{sizes.keys} tokens of {sizes.heads} heads overflow a 32-bit stride of SageAttention 3"
    return None


KERNEL = register(
    Kernel(
        name="sageattn_3_fp4",
        exports=EXPORTS,
        heads_first=True,
        options={"per_block_mean": PER_BLOCK_MEAN},
        limit=stride_limit,
    )
)


def row(name: str, runs: str, ends: str | None = None) -> Backend:
    """A row that runs this kernel, with another option on the first and last step if `ends` names one."""
    return Backend(
        runs=runs, make=backend_of(KERNEL, name), exports=EXPORTS, only=BLACKWELL, head_dims=HEAD_DIMS,
        get="a wheel of SageAttention 3 built for your torch and CUDA (RTX 50, RTX PRO Blackwell)"
        + ("" if ends is None else f", and what '{ends}' needs"), ends=ends,
    )  # fmt: skip
