"""UltraViCo (Zhao et al. 2025, thu-ml/DiT-Extrapolation): videos longer than the model was trained for.

Scores between tokens further apart than half the trained length are multiplied by alpha where they are positive, after
K is shifted by its mean; queries of the first frame do not see beyond the trained length. With alpha 1 and a video of
the trained length this is plain attention.

Kernel: torch's flex_attention in 16 bits (the authors' is INT8); on a CPU the definition itself, in slices of queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import check_entry, kernel_ready
from .contract import Backend
from .flex import flex, missing
from .third_party import refuse_mask

NAME = "sageattn_ultravico"
TRAINED_FRAMES = 21
FAR_BELOW = -1e4
SLICE = 1024


def decayed(scores: Tensor, queries: Tensor, keys: Tensor, *, places: int, alpha: float) -> Tensor:
    """Scores of tokens `queries` to `keys` (broadcast against each other) as UltraViCo changes them."""
    far = (queries - keys).abs() > places * TRAINED_FRAMES / 2
    scores = torch.where(far & (scores > 0), scores * alpha, scores)
    unseen = (queries <= places) & (keys > places * TRAINED_FRAMES)
    return torch.where(unseen, FAR_BELOW, scores)


@functools.cache
def _score_change(places: int, alpha: float) -> Callable[..., Tensor]:
    # One function a setting, so that flex_attention is compiled once for it.
    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return decayed(score, query, key, places=places, alpha=alpha)

    return change


def _eager(q: Tensor, k: Tensor, v: Tensor, places: int, alpha: float) -> Tensor:
    turned_q, turned_k, turned_v = (t.transpose(1, 2).float() for t in (q, k, v))
    keys = torch.arange(k.shape[1], device=k.device)
    parts = []
    for start in range(0, q.shape[1], SLICE):
        part = turned_q[:, :, start : start + SLICE]
        scores = part @ turned_k.transpose(-1, -2) * q.shape[-1] ** -0.5
        queries = torch.arange(start, start + part.shape[2], device=q.device)[:, None]
        parts.append(decayed(scores, queries, keys, places=places, alpha=alpha).softmax(-1) @ turned_v)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(q.dtype)


@torch.library.custom_op(op_name("ultravico_attention"), mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, places: int, alpha: float) -> Tensor:
    shifted = k - k.mean(dim=1, keepdim=True)
    ready = [kernel_ready(t) for t in (q, shifted, v)]
    check_entry(NAME, q=ready[0], k=ready[1], v=ready[2])
    if q.device.type != "cuda":
        return _eager(*ready, places, alpha)
    return flex(*ready, score=_score_change(places, alpha))


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, places: int, alpha: float) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@dataclass(frozen=True)
class UltraVico:
    """Self-attention with decay beyond the trained length. places: tokens of a frame; alpha: 1 is no decay."""

    places: int | None = None
    alpha: float = 0.9
    name: str = NAME

    def on_grid(self, grid: tuple[int, int, int]) -> UltraVico:
        """For frames of this size."""
        return replace(self, places=grid[1] * grid[2])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v. Raises ValueError for a mask, or without a grid."""
        refuse_mask(self.name, mask)
        if self.places is None:
            raise ValueError(f"attention_mode '{NAME}' needs the token grid, which cross-attention has not.")
        return _op(q, k, v, self.places, self.alpha)


ULTRAVICO = Backend(
    runs="attention with UltraViCo's decay, 16-bit, by torch's flex_attention (not the authors' INT8 kernel)",
    make=lambda spec: UltraVico(),
    extra=missing,
    get="pip install triton (on Windows triton-windows)",
)
