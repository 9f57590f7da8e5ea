"""Attention of a frame's video tokens to what belongs to that frame, with the queries of text cross-attention.

A sequence at a rate of its own (features of speech, of faces) is cut into one context for each latent frame. The
contexts overlap, and those at the ends are filled up behind what there is.
Source: Fantasy-AMAP/fantasy-talking (model.py), whose FantasyPortrait does the same with faces.
Shapes: B batch, F latent frames, G groups (F, or 1), T context tokens, A context channels, L video tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..quantized.linear import shared_input
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.tokens import Grid, Heads, Tokens, video_tokens


class Contexts(NamedTuple):
    """tokens [1, F, T, A]: contexts of a video's latent frames. lengths [1, F]: how many of T are no filling."""

    tokens: Tensor
    lengths: Tensor


def latent_ranges(count: int, frames: int) -> list[tuple[int, int]]:
    """First and last place, in a sequence of `count` tokens, of what belongs to each latent frame of a video.

    frames: pixel frames, over which the sequence is spread. Each range is as long as a latent frame's four, around
    their middle; ranges may begin before the sequence or end behind it. Raises ValueError for a single latent frame,
    which has no neighbor to be placed by.
    """
    if frames <= VAE_TIME_STRIDE:
        raise ValueError(f"num_frames is {frames}: give at least {VAE_TIME_STRIDE + 1}.")
    rate = count / frames
    half = int(rate * VAE_TIME_STRIDE / 2)
    ranges = []
    for latent in range(1, (frames - 1) // VAE_TIME_STRIDE + 1):
        first = VAE_TIME_STRIDE * (latent - 1) + 1
        middle = int((rate * first + rate * (first + VAE_TIME_STRIDE)) / 2) - 1
        ranges.append((middle - half, middle + half))
    end = ranges[0][0]
    return [(end - 2 * half, end), *ranges]


def cut(sequence: Tensor, frames: int, around: int = 0) -> Contexts:
    """Contexts of a sequence [1, N, A] for a video of so many pixel frames.

    around: how many tokens more a context has on either side. What lies outside of the sequence is zeros behind the
    rest, wherever it was. Raises ValueError as `latent_ranges`.
    """
    count = sequence.shape[1]
    ranges = torch.tensor(latent_ranges(count, frames)) + torch.tensor((-around, around))
    first, last = ranges[:, :1].clamp(min=0), ranges[:, 1:].clamp(max=count - 1)
    width = int(ranges[0, 1] - ranges[0, 0]) + 1
    places = first + torch.arange(width)
    inside = (places <= last).to(sequence.device)
    tokens = sequence[:, places.clamp(max=count - 1).to(sequence.device)]
    return Contexts(tokens * inside[..., None].to(tokens.dtype), inside.sum(dim=1)[None])


class FrameContext(NamedTuple):
    """What a block reads. tokens [B * G, T, A]; mask [B * G, 1, 1, T] of those that count, None for all; scale: 0-d;
    first, last: the video tokens that attend, G groups of equal size.
    """

    tokens: Tensor
    mask: Tensor | None
    scale: Tensor
    first: int
    last: int


def frame_context(
    tokens: Tokens, context: Tensor, *, scale: float, leading: int, lengths: Tensor | None = None
) -> FrameContext:
    """context [1 or B, F, T, A] for the latent frames behind `leading` references, or [1 or B, T, A] for all tokens.

    lengths [1 or B, F], or [1 or B]: how many context tokens count.
    """
    batch, span = tokens.x.shape[0], _span(tokens.grid, context, leading)
    if context.dim() == 3:
        context = context[:, None]
    groups, width = context.shape[1:3]
    mask = None
    if lengths is not None:
        counts = torch.arange(width, device=lengths.device) < lengths.reshape(-1, groups, 1)
        mask = counts.expand(batch, -1, -1).reshape(batch * groups, 1, 1, width).contiguous()
    rows = context.to(tokens.x.dtype).expand(batch, -1, -1, -1).reshape(batch * groups, width, -1).contiguous()
    return FrameContext(rows, mask, torch.full((), scale, device=tokens.x.device), *span)


def _span(grid: Grid, context: Tensor, leading: int) -> tuple[int, int]:
    """The tokens that attend. Raises ValueError where there are contexts for more frames than the video has."""
    if context.dim() == 3:
        return 0, video_tokens(grid)
    frames, places = leading + context.shape[1], grid[1] * grid[2]
    if frames > grid[0]:
        raise ValueError(f"There is sound or motion for {frames} latent frames, but the video has {grid[0]}.")
    return leading * places, frames * places


def attend_by_frame(
    block: WanAttentionBlock, heads: Heads, cond: FrameContext, k_proj: nn.Module, v_proj: nn.Module
) -> Heads:
    """Adds to the output heads of cross-attention those of attention to the contexts, frame by frame."""
    cross = block.cross_attn
    context = shared_input(cond.tokens, k_proj, v_proj)
    k, v = cross.split(k_proj(context)), cross.split(v_proj(context))
    video = heads.q[:, cond.first : cond.last]
    q = video.reshape(k.shape[0], -1, *video.shape[2:])
    added = cross.attention(q, k, v, mask=cond.mask).reshape(video.shape) * cond.scale
    out = heads.out[:, cond.first : cond.last] + added
    if cond.last - cond.first < heads.out.shape[1]:
        out = torch.cat((heads.out[:, : cond.first], out, heads.out[:, cond.last :]), dim=1)
    return heads._replace(out=out)
