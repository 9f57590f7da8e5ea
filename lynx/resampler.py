"""What turns ArcFace's embedding of a face into tokens for Lynx: a perceiver resampler.

Source: bytedance/lynx (modules/common/resampler), after IP-Adapter (Ye et al. 2023). Module names are published keys.
Shapes: B faces, Q queries, C width, E width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.assign import assign, head_count, layer_count
from ..wanvideo.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from ..host import Host

HEAD_SIZE = 64
MARKS = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_kv.weight", "layers.0.1.1.weight")


@dataclass(frozen=True)
class ResamplerSizes:
    """Queries, their width, inner width and heads of attention, feed-forward width, layers, widths in and out."""

    queries: int
    dim: int
    inner: int
    heads: int
    hidden: int
    layers: int
    embedding: int
    out: int


class PerceiverAttention(nn.Module):
    """Queries attend to the embedding and to themselves."""

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention = sdpa()
        self.norm1 = nn.LayerNorm(sizes.dim)
        self.norm2 = nn.LayerNorm(sizes.dim)
        self.to_q = nn.Linear(sizes.dim, sizes.inner, bias=False)
        self.to_kv = nn.Linear(sizes.dim, 2 * sizes.inner, bias=False)
        self.to_out = nn.Linear(sizes.inner, sizes.dim, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """x [B, N, C], queries [B, Q, C] -> [B, Q, C]."""
        queries = self.norm2(queries)
        k, v = self.to_kv(torch.cat((self.norm1(x), queries), dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).contiguous() for t in (self.to_q(queries), k, v))
        return self.to_out(self.attention(q, k, v).flatten(2))


class Resampler(nn.Module):
    """Learned queries that read an embedding in several layers."""

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.latents = nn.Parameter(torch.zeros(1, sizes.queries, dim))
        self.proj_in = nn.Linear(sizes.embedding, dim)
        self.proj_out = nn.Linear(dim, sizes.out)
        self.norm_out = nn.LayerNorm(sizes.out)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(sizes), _feed_forward(dim, sizes.hidden))) for _ in range(sizes.layers)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, N, E] -> tokens [B, Q, out]."""
        x, queries = self.proj_in(embedding), self.latents.expand(embedding.shape[0], -1, -1)
        for attention, feed_forward in self.layers:
            queries = queries + attention(x, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


def _feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )


class FaceResampler:
    """A loaded resampler under the host's memory management (socket LYNXRESAMPLER)."""

    def __init__(self, model: Resampler, *, dtype: torch.dtype, host: Host) -> None:
        self.model = model
        self.dtype = dtype
        self.managed = host.manage(model)

    @torch.no_grad()
    def tokens(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Of an embedding [E], and of none (zeros): [1, Q, out] float32 on the CPU each."""
        device = self.managed.acquire()
        try:
            row = embedding.to(device, self.dtype)[None, None]
            return self.model(row).float().cpu(), self.model(torch.zeros_like(row)).float().cpu()
        finally:
            self.managed.release()


def load_resampler(path: Path, *, dtype: torch.dtype, host: Host) -> FaceResampler:
    """Load it. Raises ValueError for another kind of file."""
    checkpoint = open_checkpoint(path)
    if any(mark not in checkpoint.shapes for mark in MARKS):
        raise ValueError(
            f"{path.name} is no Lynx resampler: choose lynx_lite_resampler or lynx_full_resampler; adapters are loaded "
            "by WanVideoExtraModelSelect."
        )
    latents, into, out, both, hidden = (checkpoint.shapes[mark] for mark in MARKS)
    sizes = ResamplerSizes(
        queries=latents[1],
        dim=latents[2],
        inner=both[0] // 2,
        heads=head_count(checkpoint, both[0] // 2, HEAD_SIZE),
        hidden=hidden[0],
        layers=layer_count(checkpoint.shapes, "layers."),
        embedding=into[1],
        out=out[0],
    )
    with torch.device("meta"):
        model = Resampler(sizes)
    assign(model, checkpoint, {n: n for n, _ in model.named_parameters()}, dtype=dtype, what="Lynx resampler")
    return FaceResampler(model, dtype=dtype, host=host)
