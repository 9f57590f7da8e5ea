"""Radial Attention (Li et al. 2025): attention whose window shrinks as frames lie further apart.

A query attends to the first frame, to its own frame, and to other frames within a window around its own place. The
window halves each time the distance in frames doubles; where it would be less than a block, frames are left out
instead. The rule is for tokens; a block is computed where the rule allows at least half of it.

Kernel: torch's flex_attention over the chosen blocks, in 16 bits. On a CPU the same mask goes to plain attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import op_name
from ..tensor_layout import check_entry, kernel_ready
from .contract import Backend
from .flex import flex, missing
from .third_party import refuse_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SHARE = 0.5
# In place of a decay: every block, the dense mode of the same kernel.
EVERYTHING = -1.0
NAME = "radial_sage_attention"


def window(distance: Tensor, places: int, block: int, decay: float) -> Tensor:
    """Largest difference in place that is attended between frames `distance` apart; -1 where the pair is left out."""
    # frexp's exponent is the bit length of an integer.
    group = torch.frexp(distance.float()).exponent
    length = 2.0 ** (places.bit_length() - group)
    width = (length * decay).clamp(min=block)
    width = torch.where(distance == 1, torch.full_like(width, places // 2), width)
    width = torch.where(distance == 0, torch.full_like(width, places), width)
    stride = (block / length).floor().clamp(min=1).long()
    return torch.where((distance <= 1) | (distance % stride == 0), width, torch.full_like(width, -1.0))


def allowed(queries: Tensor, grid: tuple[int, int, int], total: int, *, block: int, decay: float) -> Tensor:
    """Which of `total` keys the tokens `queries` [n] attend to: bool [n, total]. Tokens beyond the grid see all."""
    frames, height, width = grid
    places = height * width
    keys = torch.arange(total, device=queries.device)
    frame_q, frame_k = (queries // places)[:, None], (keys // places)[None]
    apart = (queries % places)[:, None] - (keys % places)[None]
    near = apart.abs() <= window((frame_q - frame_k).abs(), places, block, decay)
    return near | (frame_k == 0) | (frame_q >= frames) | (frame_k >= frames)


@functools.lru_cache(maxsize=8)
def block_table(grid: tuple[int, int, int], total: int, block: int, decay: float, device: torch.device) -> Tensor:
    """Blocks to compute: bool [query blocks, key blocks]. Every query block keeps its own."""
    count = -(-total // block)
    keys_in = torch.full((count,), float(block), device=device)
    keys_in[-1] = total - (count - 1) * block
    rows = []
    for start in range(0, total, block):
        queries = torch.arange(start, min(start + block, total), device=device)
        near = allowed(queries, grid, total, block=block, decay=decay).sum(0).float()
        share = F.pad(near, (0, count * block - total)).view(count, block).sum(1) / (keys_in * len(queries))
        rows.append(share >= SHARE)
    return torch.stack(rows) | torch.eye(count, dtype=torch.bool, device=device)


@functools.lru_cache(maxsize=8)
def _block_mask(grid: tuple[int, int, int], total: int, block: int, decay: float, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    table = _table(grid, total, block, decay, device)

    def chosen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query // block, key // block]

    counts = table.sum(1).int()[None, None]
    order = table.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    # Every block is computed whole or not at all: the kernel reads the lists, and `chosen` says the same.
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(order),
        full_kv_num_blocks=counts,
        full_kv_indices=order,
        BLOCK_SIZE=block,
        mask_mod=chosen,
        seq_lengths=(total, total),
    )


def _table(grid: tuple[int, int, int], total: int, block: int, decay: float, device: torch.device) -> Tensor:
    if decay != EVERYTHING:
        return block_table(grid, total, block, decay, device)
    count = -(-total // block)
    return torch.ones(count, count, dtype=torch.bool, device=device)


def _dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, block: int) -> Tensor:
    total = q.shape[1]
    mask = table.repeat_interleave(block, 0).repeat_interleave(block, 1)[:total, :total]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kernel_ready(mask)).transpose(1, 2).contiguous()


@torch.library.custom_op(op_name("radial_attention"), mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, grid: list[int], block: int, decay: float) -> Tensor:
    ready = [kernel_ready(t) for t in (q, k, v)]
    check_entry(NAME, q=ready[0], k=ready[1], v=ready[2])
    where = (tuple(grid), q.shape[1], block, decay, q.device)
    return flex(*ready, blocks=_block_mask(*where)) if q.is_cuda else _dense(*ready, _table(*where), block)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grid: list[int], block: int, decay: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RadialAttention:
    """Sparse self-attention for a token grid. decay: how much of the window is kept; block: tokens a block, 64 or 128.

    everything: compute all blocks, which is dense attention by the same kernel ("sparse_sage_attention").
    """

    grid: tuple[int, int, int] | None = None
    decay: float = 0.2
    block: int = 128
    everything: bool = False
    name: str = NAME

    def on_grid(self, grid: tuple[int, int, int]) -> RadialAttention:
        """For tokens that lie in this grid."""
        return replace(self, grid=grid)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v of one shape. Raises ValueError for a mask, other shapes, or without a grid."""
        refuse_mask(self.name, mask)
        if self.grid is None or not q.shape == k.shape == v.shape:
            raise ValueError(
                f"attention_mode '{NAME}' needs the token grid and as many keys as queries; choose 'sdpa'."
            )
        return _op(q, k, v, list(self.grid), self.block, EVERYTHING if self.everything else self.decay)


RADIAL = Backend(
    runs="Radial Attention's block mask, 16-bit, by torch's flex_attention (not the original's INT8 kernel)",
    make=lambda spec: RadialAttention(),
    extra=missing,
    get="pip install triton (on Windows triton-windows)",
)
