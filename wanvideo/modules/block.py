"""One block of the Wan transformer.

Source: Wan-Video/Wan2.1 and Wan2.2. Module names are the published checkpoint keys.

Shapes: B batch, L tokens, C channels, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...attention import Attention, sdpa
from ...kernels.fp8_rows import Fp8Rows
from ..config import WanConfig
from ..extension import Extension, Hooks, acts, hooked, run_hooks
from ..tokens import BlockInputs
from .attention import WanSelfAttention, WanT2VCrossAttention
from .layers import FeedForward, Residual, WanLayerNorm, added_by_norm, at_tokens, gated_residual, modulate, normalize
from .stretches import stretched


class WanAttentionBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward, each behind a norm, with the extensions' hooks between."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__()
        self.extensions: tuple[Extension, ...] = ()
        self.norm1 = WanLayerNorm(config.dim, config.eps)
        self.self_attn = WanSelfAttention(config, attention)
        self.reads_text = bool(config.text_dim)
        if self.reads_text:
            self.norm3 = WanLayerNorm(config.dim, config.eps, elementwise_affine=True)
            self.cross_attn = WanT2VCrossAttention(config, sdpa())
        self.norm2 = WanLayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, inputs: BlockInputs, conds: tuple[NamedTuple | None, ...] = ()) -> Tensor:
        """x [B, L, C] -> [B, L, C]; conds: one entry per extension of the model, None where it is idle."""
        hooks = tuple((e, c) for e, c in zip(self.extensions, conds, strict=True) if c is not None)
        modulation = self.modulated(inputs)
        stream, hooks = self._attended(x, inputs, hooks, modulation[:3])
        # Given away: `read` frees what it adds to, which this frame would hold until it returns.
        given = [stream]
        del x, stream
        return self.read(given.pop(), inputs, hooks, modulation[3:])

    def modulated(self, inputs: BlockInputs) -> tuple[Tensor, ...]:
        """Rows of shift, scale and gate [B, R, C] of self-attention, then those of the feed-forward."""
        return (self.modulation.to(inputs.mod.dtype).unsqueeze(1) + inputs.mod).unbind(2)

    def attend(self, x: Tensor, inputs: BlockInputs, hooks: Hooks, rows: Sequence[Tensor]) -> tuple[Tensor, Hooks]:
        """The first half of a block: x and self-attention."""
        x, hooks = self._attended(x, inputs, hooks, rows)
        return (x.added() if isinstance(x, Residual) else x), hooks

    def _attended(
        self, x: Tensor, inputs: BlockInputs, hooks: Hooks, rows: Sequence[Tensor]
    ) -> tuple[Tensor | Residual, Hooks]:
        """Modulation of each token, float32, is as large as two activations: it is made in pieces, too."""
        count, parts = x.shape[1], 1 if inputs.rows is None else inputs.parts
        # Both read the input as it is.
        plain = hooked("self_attn_input", hooks) or hooked("projected", hooks)
        readers = () if plain else self.self_attn.readers()

        def modulated(tokens: slice) -> Tensor | Fp8Rows:
            shift, scale, _ = at_tokens(rows, inputs.rows, tokens)
            return modulate(self.norm1, x[:, tokens], shift, scale, readers)

        read, hooks = run_hooks("self_attn_input", self, stretched(modulated, count, parts), hooks)
        y, hooks = self.self_attn(read, inputs, hooks, self)
        del read
        y, hooks = run_hooks("self_attn_output", self, y, hooks)
        if self.reads_text and _joins("before_cross_attn", x, inputs, hooks):
            summed = Residual(x, y, at_tokens(rows, inputs.rows, slice(None))[2])
            return run_hooks("before_cross_attn", self, summed, hooks)
        x = stretched(lambda t: gated_residual(x[:, t], y[:, t], at_tokens(rows, inputs.rows, t)[2]), count, parts)
        return run_hooks("before_cross_attn", self, x, hooks)

    def read(self, x: Tensor | Residual, inputs: BlockInputs, hooks: Hooks, rows: Sequence[Tensor]) -> Tensor:
        """The second half: text cross-attention and feed-forward, each added to x."""
        if self.reads_text:
            x, hooks = self._read_text(x, inputs, hooks)
        x, _ = run_hooks("after_cross_attn", self, x, hooks)
        return self._feed_forward(x, inputs, rows)

    def _read_text(
        self, x: Tensor | Residual, inputs: BlockInputs, hooks: Hooks
    ) -> tuple[Tensor | Residual, Hooks]:
        """x and cross-attention: in pieces, unless what is read depends on the place of a token."""
        readers, after = self.cross_attn.readers(), hooks
        if isinstance(x, Residual):
            x, normed = x.normalized(self.norm3, readers)
            y, after = self.cross_attn(normed, inputs, hooks, self)
            summed = Residual(x, y)
            return (summed if _joins("after_cross_attn", x, inputs, hooks) else summed.added()), after

        def read(tokens: slice) -> Tensor:
            nonlocal after
            piece = x[:, tokens]
            y, after = self.cross_attn(normalize(self.norm3, piece, readers), inputs, hooks, self)
            return piece + y

        alone = inputs.text.tokenwise and all(e.tokenwise for e, c in hooks if acts("cross_attn", e, c))
        return stretched(read, x.shape[1], inputs.parts if alone else 1), after

    def _feed_forward(self, x: Tensor | Residual, inputs: BlockInputs, rows: Sequence[Tensor]) -> Tensor:
        """x and the feed-forward, whose hidden layer is the largest activation of all."""
        readers = self.ffn.readers()
        if isinstance(x, Residual):
            shift, scale, gate = at_tokens(rows, inputs.rows, slice(None))
            x, read = x.modulated(self.norm2, shift, scale, readers)
            return gated_residual(x, self.ffn(read), gate)

        def fed(tokens: slice) -> Tensor:
            piece, (shift, scale, gate) = x[:, tokens], at_tokens(rows, inputs.rows, tokens)
            return gated_residual(piece, self.ffn(modulate(self.norm2, piece, shift, scale, readers)), gate)

        return stretched(fed, x.shape[1], inputs.parts)


def _joins(name: str, x: Tensor, inputs: BlockInputs, hooks: Hooks) -> bool:
    """Whether a norm may add what comes before the hook `name`: whoever looks at it there takes a sum."""
    looks = any(name not in extension.takes_sums for extension, cond in hooks if acts(name, extension, cond))
    return inputs.parts == 1 and added_by_norm(x) and not looks
