"""Attention backends: one protocol, one table, resolved once when a model is loaded.

Every backend takes and returns [batch, tokens, heads, head size]. A backend that cannot run is an error that lists all
backends and their reasons; nothing is ever replaced silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_cudnn import CudnnFp8, why_not
from .kernels import op_name
from .tensor_layout import check_entry, kernel_ready
from .wanvideo.extension import AttentionCall

ATTENTION_MODES = (
    "sdpa",
    "flash_attn_2",
    "flash_attn_3",
    "sageattn",
    "sageattn_3",
    "radial_sage_attention",
    "sageattn_compiled",
    "sageattn_ultravico",
    "comfy",
)


class Attention(Protocol):
    """A backend: q, k, v [B, L, H, D] -> [B, L, H, D], contiguous. mask [B, H, Lq, Lk] or 1 for B, H: True allows."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Softmax attention with scale D ** -0.5."""


def _sdpa_bshd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


@torch.library.custom_op(op_name("sdpa"), mutates_args=())
def _sdpa_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = kernel_ready(q), kernel_ready(k), kernel_ready(v)
    mask = mask if mask is None else kernel_ready(mask)
    check_entry("sdpa", q=q, k=k, v=v, mask=mask)
    out = _sdpa_bshd(q, k, v, mask)
    # An operator may not return one of its inputs, which a zero-copy transpose of v could be for a single key.
    return out if out.data_ptr() not in {q.data_ptr(), k.data_ptr(), v.data_ptr()} else out.clone()


@_sdpa_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled dot product attention, behind an opaque op that makes its arguments kernel-ready."""

    name: str = "sdpa"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v; differentiable when gradients are on."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _sdpa_bshd(q, k, v, mask)
        return _sdpa_op(q, k, v, mask)


@dataclass(frozen=True)
class Backend:
    """A row of the table: how to make the backend, and why it cannot run (None where it can)."""

    make: Callable[[], Attention] | None
    reason: Callable[[torch.device, int], str | None]


def _runs(device: torch.device, head_dim: int) -> str | None:
    return None


def _not_built(device: torch.device, head_dim: int) -> str | None:
    return "this version does not have it"


BACKENDS: dict[str, Backend] = {name: Backend(None, _not_built) for name in ATTENTION_MODES}
BACKENDS["sdpa"] = Backend(Sdpa, _runs)
BACKENDS["cudnn_fp8"] = Backend(CudnnFp8, why_not)


def resolve(name: str, *, device: torch.device, head_dim: int) -> Attention:
    """The backend called `name` for this device and head size.

    Raises ValueError, listing every backend with the reason why it cannot run, if that one cannot.
    """
    backend = BACKENDS.get(name)
    reason = "it is unknown" if backend is None else backend.reason(device, head_dim)
    if backend is None or backend.make is None or reason is not None:
        table = "; ".join(f"{n}: {b.reason(device, head_dim) or 'runs'}" for n, b in BACKENDS.items())
        raise ValueError(f"attention_mode '{name}' cannot run because {reason}. Choose one that runs. {table}.")
    return backend.make()


def attend(attention: Attention, call: AttentionCall) -> Tensor:
    """Run `attention` over the whole call, or span by span: each query range sees its own key range only."""
    if not call.spans:
        return attention(call.q, call.k, call.v)
    parts = [attention(call.q[:, q0:q1], call.k[:, k0:k1], call.v[:, k0:k1]) for (q0, q1), (k0, k1) in call.spans]
    return torch.cat(parts, dim=1)


def sdpa() -> Attention:
    """The backend of every cross-attention: few keys, so none of the special kernels wins."""
    return Sdpa()
