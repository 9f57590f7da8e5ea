"""Triton kernel of class_attention.py.

A program takes some queries of one head, and all keys. The masks are the columns of a second product, and so are all
keys: what is divided and what it is divided by are sums of the same rounded weights.

Exponentials need the row's largest score only to stay within float32. Where the lengths of queries and keys say that
none leaves it (Cauchy and Schwarz), scores are taken as they are: the maximum is a third of the loop's instructions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries and keys at a time, warps, and tiles of keys on their way: two programs fit a multiprocessor of an H200.
QUERIES, KEYS, WARPS, STAGES = 128, 128, 8, 2
# The fewest that a product takes, from Triton 3.5 on and before.
COLUMNS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16
# Powers of 2 up to which, either way, no weight is rounded to 0 and no sum of 2 ** 26 weights is infinite.
RANGE = 100.0


@triton.jit
def _class_shares(q, k, members, reach, out, tokens, keys, classes, q_batch, q_token, q_head, k_batch, k_token, k_head,
                  factor, RANGE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
                  SIZE: tl.constexpr):  # fmt: skip
    head, batch, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key, channel, column = tl.arange(0, KEYS), tl.arange(0, SIZE), tl.arange(0, COLUMNS)[None, :]
    # Behind the last query, that one once more.
    row = tl.minimum(token, tokens - 1).to(tl.int64)
    queries = tl.load(q + batch * q_batch + head * q_head + row[:, None] * q_token + channel[None, :])
    wide = queries.to(tl.float32)
    longest = tl.sqrt(tl.max(tl.sum(wide * wide, axis=1), axis=0))
    far = longest * tl.load(reach + batch * heads + head) * factor >= RANGE
    k += batch * k_batch + head * k_head
    top = tl.zeros([QUERIES], tl.float32) - tl.where(far, float("inf"), 0.0)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for first in range(0, keys, KEYS):
        # Behind the last key, that one once more, which no column has. The score of a zero may be the largest by far.
        place = tl.minimum(first + key, keys - 1)
        some = tl.load(k + place[None, :] * k_token + channel[:, None])
        columns = tl.load(members + (first + key)[:, None] * COLUMNS + column)
        scores = tl.dot(queries, some)
        if far:
            higher = tl.maximum(top, tl.max(scores, axis=1) * factor)
            sums *= tl.exp2(top - higher)[:, None]
            top = higher
        weights = tl.exp2(scores * factor - top[:, None])
        sums = tl.dot(weights.to(columns.dtype), columns, sums)
    total = tl.sum(tl.where(column == classes, sums, 0.0), axis=1)
    place = ((batch * heads + head) * tokens + token[:, None]) * classes + column
    tl.store(out + place, sums / total[:, None], mask=(token < tokens)[:, None] & (column < classes))


def class_shares(q: Tensor, k: Tensor, masks: Tensor, out: Tensor) -> None:
    """q [B, L, H, D], k [B, S, H, D], last dimension dense, masks [N, S] -> out [B, H, L, N] float32, contiguous."""
    if out.numel() == 0:
        return
    batch, heads, tokens, classes = out.shape
    keys, size = k.shape[1], k.shape[3]
    reach = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax(dim=1)
    with torch.cuda.device_of(q):
        _class_shares[(triton.cdiv(tokens, QUERIES), heads, batch)](
            q, k, _members(masks), reach, out, tokens, keys, classes, *q.stride()[:3], *k.stride()[:3],
            math.log2(math.e) / math.sqrt(size), RANGE=RANGE, QUERIES=QUERIES, KEYS=KEYS, COLUMNS=COLUMNS, SIZE=size,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip


def _members(masks: Tensor) -> Tensor:
    """[whole tiles of keys, COLUMNS] of 0 and 1: the classes, then all keys. bfloat16 holds weights of any RANGE."""
    classes, keys = masks.shape
    out = torch.zeros(triton.cdiv(keys, KEYS) * KEYS, COLUMNS, dtype=torch.bfloat16, device=masks.device)
    out[:keys, :classes] = masks.t()
    out[:keys, classes] = 1
    return out
