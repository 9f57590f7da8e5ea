"""Attention: the table of options, and how one is resolved when a model is loaded.

Every backend takes and returns [batch, tokens, heads, head size] (`attention_backends/contract.py`). A backend that
cannot run is an error that lists all backends and their reasons; nothing is ever replaced silently. The optional
packages behind the backends are imported when an option is resolved, never before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .attention_backends.contract import Attention, AttentionSpec, Backend, FusedAttention, GridAttention
from .attention_backends.torch_sdpa import Sdpa
from .wanvideo.extension import AttentionCall

__all__ = [
    "ATTENTION_MODES",
    "BACKENDS",
    "Attention",
    "AttentionSpec",
    "Backend",
    "FusedAttention",
    "GridAttention",
    "attend",
    "resolve",
    "sdpa",
]

BACKENDS: Mapping[str, Backend] = {
    "sdpa": Backend(runs="torch's scaled dot product attention", make=lambda spec: Sdpa(), masks=True),
    **{
        name: Backend(runs=name)
        for name in (
            "flash_attn_2",
            "flash_attn_3",
            "sageattn",
            "sageattn_3",
            "radial_sage_attention",
            "sageattn_compiled",
            "sageattn_ultravico",
            "comfy",
        )
    },
}
ATTENTION_MODES = tuple(BACKENDS)


def resolve(name: str, spec: AttentionSpec) -> Attention:
    """The backend called `name` for this device, precision and head size.

    Raises ValueError, listing every backend with the reason why it cannot run, if that one cannot.
    """
    backend = BACKENDS.get(name)
    reason = "it is unknown" if backend is None else backend.reason(spec)
    if backend is None or reason is not None:
        table = "; ".join(f"{n}: {b.reason(spec) or 'runs'}" for n, b in BACKENDS.items())
        raise ValueError(f"attention_mode '{name}' cannot run because {reason}. Choose one that runs. {table}.")
    return backend.make(spec)


def attend(attention: Attention, call: AttentionCall) -> Tensor:
    """Run `attention` over the whole call, or span by span: each query range sees its own key range only."""
    if not call.spans:
        return attention(call.q, call.k, call.v)
    parts = [attention(call.q[:, q0:q1], call.k[:, k0:k1], call.v[:, k0:k1]) for (q0, q1), (k0, k1) in call.spans]
    return torch.cat(parts, dim=1)


def sdpa() -> Attention:
    """The backend of every cross-attention: few keys, so none of the special kernels wins."""
    return Sdpa()
