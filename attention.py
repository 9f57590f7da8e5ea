"""Attention: the table of options, and how one is resolved when a model is loaded.

Every backend takes and returns [batch, tokens, heads, head size] (`attention_backends/contract.py`). A backend that
cannot run is an error that lists all backends and their reasons; nothing is ever replaced silently. The optional
packages behind the backends are imported when an option is resolved, never before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .attention_backends import sage, sage3
from .attention_backends.auto_fp8 import AUTO_FP8
from .attention_backends.comfy import COMFY
from .attention_backends.contract import (
    Attention,
    AttentionCall,
    AttentionSpec,
    Backend,
    FusedAttention,
    GridAttention,
)
from .attention_backends.cudnn import CUDNN_FP8
from .attention_backends.flash import FLASH_2, FLASH_3
from .attention_backends.flash_fp8 import FLASH_3_FP8
from .attention_backends.radial import RADIAL
from .attention_backends.sol import SOL
from .attention_backends.torch_sdpa import Sdpa
from .attention_backends.ultravico import ULTRAVICO

__all__ = [
    "ATTENTION_MODES",
    "BACKENDS",
    "Attention",
    "AttentionCall",
    "AttentionSpec",
    "Backend",
    "FusedAttention",
    "GridAttention",
    "attend",
    "reason",
    "resolve",
    "sdpa",
]


# The original's options in its order, then this project's.
BACKENDS: Mapping[str, Backend] = {
    "sdpa": Backend(runs="torch's scaled dot product attention", make=lambda spec: Sdpa(), any_dtype=True, masks=True),
    "flash_attn_2": FLASH_2,
    "flash_attn_3": FLASH_3,
    "sageattn": sage.auto("sageattn", "the kernel that SageAttention picks for the GPU (INT8 QK)"),
    "sageattn_3": sage3.row(
        "sageattn_3", "SageAttention 3 (FP4), and 'sageattn' on the first and last step", ends="sageattn"
    ),
    "radial_sage_attention": RADIAL,
    "sageattn_compiled": sage.auto(
        "sageattn_compiled", "the same as 'sageattn': all kernels here are operators that compiled blocks call"
    ),
    "sageattn_ultravico": ULTRAVICO,
    "comfy": COMFY,
    "sageattn_3_fp4": sage3.row("sageattn_3_fp4", "SageAttention 3 (FP4) on every step"),
    "sageattn_3_fp8": sage.EIGHT_BIT,
    "sageattn_varlen": sage.VARLEN,
    "cudnn_fp8": CUDNN_FP8,
    "sol_attn": SOL,
    "fa3_fp8": FLASH_3_FP8,
    "auto_fp8": AUTO_FP8,
}
ATTENTION_MODES = tuple(BACKENDS)


def resolve(name: str, spec: AttentionSpec) -> Attention:
    """The backend called `name` for this device, precision and head size.

    Raises ValueError if it cannot run, naming those that do, then each other with its reason.
    """
    why = reason(name, spec)
    if why is not None:
        reasons = {other: reason(other, spec) for other in BACKENDS if other != name}
        able = ", ".join(other for other, its in reasons.items() if its is None)
        unable = "; ".join(f"{other}: {its}" for other, its in reasons.items() if its is not None)
        raise ValueError(
            f"attention_mode '{name}' cannot run because {why}. These run here: {able}. The others do not: {unable}."
        )
    return BACKENDS[name].make(spec)


def reason(name: str, spec: AttentionSpec) -> str | None:
    """Why the option `name` cannot run, None where it can."""
    backend = BACKENDS.get(name)
    if backend is None:
        return "it is unknown"
    own = backend.reason(spec)
    if own is not None or backend.ends is None:
        return own
    other = BACKENDS[backend.ends].reason(spec)
    return None if other is None else f"'{backend.ends}', which its first and last step run, cannot: {other}"


def attend(attention: Attention, call: AttentionCall) -> Tensor:
    """Run `attention` over the whole call, or span by span: each query range sees its own key range only.

    Batch entries of different k_lens run one by one: that is exact for every backend, those without masks too. Raises
    ValueError for k_lens that do not fit the keys.
    """
    if call.k_lens:
        return _without_padding(attention, call)
    if not call.spans:
        return attention(call.q, call.k, call.v)
    parts = [attention(call.q[:, q0:q1], call.k[:, k0:k1], call.v[:, k0:k1]) for (q0, q1), (k0, k1) in call.spans]
    return torch.cat(parts, dim=1)


def _without_padding(attention: Attention, call: AttentionCall) -> Tensor:
    q, k, v, spans, lengths = call
    if len(lengths) != k.shape[0] or not all(0 < length <= k.shape[1] for length in lengths):
        raise ValueError(f"k_lens {lengths} do not fit keys of shape {tuple(k.shape)}.")
    if len(set(lengths)) > 1:
        rows = [slice(i, i + 1) for i in range(len(lengths))]
        calls = (AttentionCall(q[i], k[i], v[i], spans, (n,)) for i, n in zip(rows, lengths, strict=True))
        return torch.cat([_without_padding(attention, one) for one in calls])
    if any(first >= lengths[0] for _, (first, _) in spans):
        raise ValueError(f"A span of {spans} has padding alone: k_lens is {lengths}.")
    spans = tuple((queries, (first, min(last, lengths[0]))) for queries, (first, last) in spans)
    return attend(attention, AttentionCall(q, k[:, : lengths[0]], v[:, : lengths[0]], spans))


def sdpa() -> Attention:
    """The backend of every cross-attention: few keys, so none of the special kernels wins."""
    return Sdpa()
