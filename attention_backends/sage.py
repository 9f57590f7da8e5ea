"""SageAttention 1 and 2: queries and keys in INT8 (Zhang et al. 2024, 2025; package `sageattention`).

`sageattn` picks its kernel by the GPU. `sageattn_3_fp8` pins the 8-bit one: INT8 queries and keys, FP8 probabilities
and values.
"""

from __future__ import annotations

import importlib.metadata

from . import packages
from .contract import AttentionSpec, Backend, capability, dotted
from .third_party import Kernel, Sizes, backend_of, register

PACKAGE = "sageattention"
LEAST = (8, 0)
LEAST_FP8 = (8, 9)
HOPPER = (9, 0)
HEAD_DIMS = (64, 96, 128)
# 1.0.6's kernel for packed sequences has none for 96.
HEAD_DIMS_PACKED = (64, 128)
GET = "pip install sageattention (1.0.6, Triton), or a wheel of SageAttention 2.2 built for your torch and CUDA"
# The FP8 kernel gives noise above this many keys on consumer Blackwell (SageAttention issue 388).
NOISY_KEYS = 160_000
CONSUMER_BLACKWELL = ((12, 0), (12, 1))
# What `sageattn` of version 2.2 knows (its core.py).
DISPATCHED = ((8, 0), (8, 6), (8, 9), (9, 0), *CONSUMER_BLACKWELL)
ROW_LAYOUT = {"tensor_layout": "NHD"}


def _undispatched(spec: AttentionSpec) -> str | None:
    """Why SageAttention's own choice has nothing for the GPU; its version 1 is Triton's and runs on any."""
    if spec.capability is None or spec.capability in DISPATCHED:
        return None
    try:
        installed = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if installed.startswith("1."):
        return None
    return (
        f"SageAttention {installed} picks no kernel for compute capability {dotted(spec.capability)}, only for "
        + ", ".join(dotted(known) for known in DISPATCHED)
    )


def _noise_limit(sizes: Sizes) -> str | None:
    if sizes.keys > NOISY_KEYS and capability(sizes.device) in CONSUMER_BLACKWELL:
        return f"SageAttention's FP8 kernel gives noise above {NOISY_KEYS} tokens on this GPU: {sizes.keys} here"
    return None


AUTO = register(Kernel(name="sageattn", exports=((PACKAGE, "sageattn"),), options=ROW_LAYOUT, limit=_noise_limit))
PACKED = register(Kernel(name="sageattn_varlen", exports=((PACKAGE, "sageattn_varlen"),), packed=True))
FP8 = register(
    Kernel(
        name="sageattn_3_fp8",
        exports=((PACKAGE, "sageattn_qk_int8_pv_fp8_cuda"),),
        options=ROW_LAYOUT,
    )
)
FP8_BLACKWELL = register(
    Kernel(
        name="sageattn_3_fp8_sm120",
        exports=FP8.exports,
        # As 'sageattn' itself calls it on these GPUs.
        options={**ROW_LAYOUT, "qk_quant_gran": "per_warp"},
        limit=_noise_limit,
    )
)
FP8_HOPPER = register(
    Kernel(name="sageattn_3_fp8_sm90", exports=((PACKAGE, "sageattn_qk_int8_pv_fp8_cuda_sm90"),), options=ROW_LAYOUT)
)


def auto(name: str, runs: str) -> Backend:
    """A row that runs the kernel SageAttention picks for the GPU."""
    return Backend(
        runs=runs, make=backend_of(AUTO, name), exports=AUTO.exports, least=LEAST, head_dims=HEAD_DIMS, get=GET,
        extra=_undispatched,
    )  # fmt: skip


def fp8_kernel(spec: AttentionSpec) -> Kernel:
    """The 8-bit kernel for the GPU, of which Hopper has one of its own, with the options for it."""
    if spec.capability == HOPPER:
        return FP8_HOPPER
    return FP8_BLACKWELL if spec.capability in CONSUMER_BLACKWELL else FP8


VARLEN = Backend(
    runs="SageAttention's kernel for packed sequences: INT8 QK, 16-bit PV, Triton",
    make=backend_of(PACKED, "sageattn_varlen"),
    exports=PACKED.exports,
    least=LEAST,
    head_dims=HEAD_DIMS_PACKED,
    get=GET,
)
EIGHT_BIT = Backend(
    runs="SageAttention 2's 8-bit kernel (INT8 QK, FP8 PV) on every step",
    make=lambda spec: backend_of(fp8_kernel(spec), "sageattn_3_fp8")(spec),
    least=LEAST_FP8,
    head_dims=(64, 128),
    extra=lambda spec: packages.reason(fp8_kernel(spec).exports),
    get="a wheel of SageAttention 2.2 built for your torch and CUDA; PyPI's 1.0.6 has no FP8 kernel",
)
