"""What flows through the Wan transformer: inputs of a forward, the token sequence, inputs of blocks and of attention.

Shapes: B batch, L tokens, C channels, H heads, D head size, R rows of modulation, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..attention import Attention
from ..kernels.fp8_rows import Fp8Rows
from .conditioning import Payload, Step
from .shard import WHOLE, Shard

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One forward pass.

    latents [B, channels, F, H, W]: the noise; extensions join condition channels. timestep [B], or [B, F] for one per
    latent frame, 0..1000. text: B tensors [tokens, text_dim] without padding. prompts: the same of the passes with the
    prompt, for what reads the prompt in every pass; None where `text` is that. payloads: what the extensions read.
    """

    latents: Tensor
    timestep: Tensor
    text: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...] | None = None
    payloads: tuple[Payload, ...] = ()
    step: Step = Step()
    riflex_index: int = 0


class Projections(NamedTuple):
    """Self-attention before norms and positions: its input x, and what the linear layers make of it; all [B, L, C]."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Heads(NamedTuple):
    """Attention after the kernel and before the output projection: q, k, out [B, L, H, D].

    In self-attention q and k are post-RoPE, of as many of the first tokens as `reads_heads` of active extensions asks
    for or more, and None where that is none; where no one reads the result, out may be FP8 rows [B, L, C]. In
    cross-attention q is the normalized query and k is None.
    """

    q: Tensor | None
    k: Tensor | None
    out: Tensor | Fp8Rows


class HeadsRead(NamedTuple):
    """What of the `Heads` of self-attention is read: the first so many queries and keys (None: all), and the result.

    What is not read is not there where a fused kernel keeps it to itself.
    """

    queries: int | None = None
    keys: int | None = None
    result: bool = True

    def joined(self, other: HeadsRead) -> HeadsRead:
        """What two readers read together."""
        queries, keys = _most(self.queries, other.queries), _most(self.keys, other.keys)
        return HeadsRead(queries, keys, self.result or other.result)


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


class KeysValues(NamedTuple):
    """Keys and values of a cross-attention, [B, T, H, D]."""

    k: Tensor
    v: Tensor


class CrossAttention(Protocol):
    """What a `TextSource` may use of a block's cross-attention."""

    attention: Attention

    def keys_values(self, text: Tensor) -> KeysValues:
        """Embedded text [B, T, C] through this block's own projections."""


class TextSource(Protocol):
    """What the cross-attention of every block reads. A NamedTuple of tensors, because it enters compiled graphs.

    tokenwise: what a query gets does not depend on its place, so that some of them may be asked for alone.
    """

    tokenwise: bool

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """Heads [B, L, H, D] of the queries q [B, L, H, D], before the output projection."""

    def on(self, shard: Shard) -> TextSource:
        """The same for the queries of this part of the sequence."""


class Text(NamedTuple):
    """Embedded prompts [B, T, C]: the plain text source."""

    tokens: Tensor
    tokenwise = True

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """All queries to all tokens."""
        k, v = cross.keys_values(self.tokens)
        return cross.attention(q, k, v)

    def on(self, shard: Shard) -> Text:
        """The same text for all."""
        return self


class BlockInputs(NamedTuple):
    """What every block reads besides its tokens, a system's own blocks included.

    mod [B, R, 6, C] float32; rows [L] token -> row of mod, None where R is 1; rope [L, D/2, 2] cosine, sine;
    grid (frames, height, width) of the video tokens; attention: the backend of self-attention in this step and block,
    None for the module's own. conds: in `after_block`, what weightless extensions give to blocks of other systems: one
    entry for each of the model's extensions. parts: in how many pieces layers that compute every token alone run.
    shard: the part of the sequence that all of this is of.
    """

    mod: Tensor
    rows: Tensor | None
    rope: Tensor
    text: TextSource
    grid: Grid
    attention: Attention | None = None
    conds: tuple[NamedTuple | None, ...] = ()
    parts: int = 1
    shard: Shard = WHOLE


class Tokens(NamedTuple):
    """The sequence on its way to the blocks; `Extension.prepare` may change any of it.

    x [B, L, C]; mod [B, R, 6, C] float32; rows [L] or None; rope [L, D/2, 2]; grid of the video tokens, which always
    come first; text: what cross-attention reads; embedding [B, R, C] float32: the time embedding before its projection;
    latents [B, in_dim, F, H, W]: what the patch embedding read, joined channels included.
    """

    x: Tensor
    mod: Tensor
    rows: Tensor | None
    rope: Tensor
    grid: Grid
    text: TextSource
    embedding: Tensor
    latents: Tensor

    def on(self, shard: Shard) -> Tokens:
        """The tokens of this part of the sequence."""
        return self._replace(
            x=shard.take(self.x),
            rows=None if self.rows is None else shard.take(self.rows, dim=0),
            rope=shard.take(self.rope, dim=0),
            grid=shard.grid(self.grid),
            text=self.text.on(shard),
        )

    @property
    def last_frame_mod(self) -> Tensor | None:
        """Modulation [B, 1, 6, C] of the last frame of the video; None where all tokens share one, as in `appended`."""
        if self.rows is None:
            return None
        last = video_tokens(self.grid)
        return self.mod[:, self.rows[last - 1 : last]]

    def appended(self, x: Tensor, rope: Tensor, mod: Tensor | None = None) -> Tokens:
        """With more tokens x [1 or B, N, C] at positions rope [N, D/2, 2] behind the others.

        mod [1 or B, 1, 6, C]: their own modulation (`Transformer.clean_modulation`, say); None is that of the first
        frame. Raises ValueError for more or fewer positions than tokens.
        """
        batch, count, rows, rows_of = self.x.shape[0], x.shape[1], self.rows, self.mod
        if rope.shape[0] != count:
            raise ValueError(f"{count} tokens are appended at {rope.shape[0]} positions: give each a row of `rope`.")
        if mod is not None:
            before = rows if rows is not None else torch.zeros(self.x.shape[1], dtype=torch.long, device=x.device)
            rows = torch.cat((before, before.new_full((count,), rows_of.shape[1])))
            rows_of = torch.cat((rows_of, mod.to(rows_of).expand(batch, -1, -1, -1)), dim=1)
        elif rows is not None:
            rows = torch.cat((rows, rows.new_zeros(count)))
        more = x.to(self.x.dtype).expand(batch, -1, -1)
        return self._replace(
            x=torch.cat((self.x, more), dim=1), mod=rows_of, rows=rows, rope=torch.cat((self.rope, rope))
        )


def video_tokens(grid: Grid) -> int:
    """How many tokens of the sequence are the video's: the first ones."""
    return grid[0] * grid[1] * grid[2]
