"""torch's flex_attention, compiled once a kind of score change, for attention that is sparse or reweighted by place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import packages
from .contract import AttentionSpec
from .third_party import DTYPES

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# A kernel for each size and setting of a session. At torch's own limits flex_attention would go on uncompiled, with the
# whole matrix of scores; with fullgraph it raises.
LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 512}
# 128 x 128 tiles do not fit into blocks of 64.
SMALL_BLOCK = 64
# flex_attention takes a block of this size for any length.
WHOLE_BLOCK = 1 << 30


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # It brings torch's whole compiler along, which the import of the pack must not.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.cache
def _all_blocks(device: torch.device) -> BlockMask:
    # flex_attention's own default is the same, but it cannot be built while a compiled model runs.
    from torch.nn.attention.flex_attention import BlockMask

    one = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(one, nothing, BLOCK_SIZE=WHOLE_BLOCK, seq_lengths=(1, 1))


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: BlockMask | None = None, score: Callable[..., Tensor] | None = None
) -> Tensor:
    """Attention of q, k, v [B, L, H, D] on a GPU, over the blocks of a mask or with changed scores: [B, L, H, D]."""
    dtype = q.dtype if q.dtype in DTYPES else DTYPES[0]
    turned = (t.to(dtype).transpose(1, 2).contiguous() for t in (q, k, v))
    blocks = _all_blocks(q.device) if blocks is None else blocks
    small = blocks.BLOCK_SIZE[0] == SMALL_BLOCK
    options = {"BLOCK_M": SMALL_BLOCK, "BLOCK_N": SMALL_BLOCK} if small else None
    with torch._dynamo.config.patch(LIMITS):
        out = _compiled()(*turned, block_mask=blocks, score_mod=score, kernel_options=options)
    return out.transpose(1, 2).contiguous().to(q.dtype)


def missing(spec: AttentionSpec) -> str | None:
    """Why flex_attention would not be compiled for the device."""
    if spec.device.type != "cuda":
        return None
    why = packages.reason((("triton", "jit"),))
    return None if why is None else f"its kernel is compiled by Triton, and {why}"
