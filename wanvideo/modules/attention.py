"""The attentions of a Wan block: video tokens to each other, to the text, and to the tokens of a picture.

Source: Wan-Video/Wan2.1. Shapes: B batch, L tokens, C channels, H heads, D head size, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...attention import Attention, AttentionCall, GridAttention, attend
from ...attention_backends.contract import Projection
from ...kernels.fp8_rows import Fp8Rows
from ...quantized.linear import all_take_rows, shared_input
from ...tensor_layout import dense
from ..config import WanConfig
from ..extension import Hooks, heads_read, hooked, run_hooks
from ..shard import Shard
from ..tokens import BlockInputs, Heads, KeysValues, Projections
from .layers import WanRMSNorm


class WanSelfAttention(nn.Module):
    """Attention of all video tokens to each other.

    fusible: kernels may norm queries and keys themselves. projections: how many of the size of q there are at once.
    """

    fusible, projections = True, 4

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__()
        dim = config.dim
        self.heads = (config.num_heads, config.head_dim)
        self.attention = attention
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, config.eps)
        self.norm_k = WanRMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, H, D]."""
        return dense(x).unflatten(-1, self.heads)

    def project(self, out: Tensor | Fp8Rows) -> Tensor:
        """Heads [B, L, H, D], or rows [B, L, C], through the output projection: [B, L, C]."""
        return self.o(out if isinstance(out, Fp8Rows) else out.flatten(2).contiguous())

    def readers(self) -> tuple[nn.Module, ...]:
        """The linear layers that read the normalized video tokens."""
        return self.q, self.k, self.v

    def forward(self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: nn.Module) -> tuple[Tensor, Hooks]:
        """x [B, L, C] modulated -> [B, L, C], before gate and residual."""
        heads, hooks = self._attended(x, inputs, hooks, block)
        heads, hooks = run_hooks("self_attn", block, heads, hooks)
        return self.project(heads.out), hooks

    def _attended(
        self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: nn.Module
    ) -> tuple[Heads, Hooks]:
        """The heads behind the kernel. q, k and v end here: the output projection has their memory."""
        attention = inputs.attention or self.attention
        (q, k, v), hooks = self._projections(x, hooks, block)
        read, changed = heads_read(hooks), hooked("attend", hooks)
        fused = None if changed else self._fused(attention, inputs.shard, rows=not read.result)
        if fused is not None:
            seen: dict[str, Tensor] = {}
            # Placed once more for who reads them, while the projection is there: less than giving up the kernel's form.
            q = self._seen("q", q, self.norm_q, inputs.rope, read.queries, seen)
            k = self._seen("k", k, self.norm_k, inputs.rope, read.keys, seen)
            out = fused(q, k, lambda: self.split(v()), self.norm_q, self.norm_k, inputs.rope)
            return Heads(seen.get("q"), seen.get("k"), out), hooks
        shard, in_order = inputs.shard, changed or isinstance(attention, GridAttention)
        # v goes first: where processes share the heads, it is sent before q and k are made, and waited for behind them.
        all_v = shard.heads(self.split(v()), in_order=in_order)
        placed_q = self.norm_q.placed(q(), inputs.rope, self.heads)
        all_q = shard.heads(placed_q, in_order=in_order)
        placed_k = self.norm_k.placed(k(), inputs.rope, self.heads)
        all_k = shard.heads(placed_k, in_order=in_order)
        # v first, as it was sent: what is left to do when it and q arrive is done while k is still on its way.
        call = AttentionCall(v=all_v(), q=all_q(), k=all_k())
        call, hooks = run_hooks("attend", block, call, hooks)
        out = shard.tokens(attend(attention, call), heads=self.heads[0], in_order=in_order)
        return Heads(None if read.queries == 0 else placed_q, None if read.keys == 0 else placed_k, out), hooks

    def _projections(
        self, x: Tensor | Fp8Rows, hooks: Hooks, block: nn.Module
    ) -> tuple[tuple[Projection, Projection, Projection], Hooks]:
        """q, k, v [B, L, C], each made when it is asked for, unless a hook reads all three."""
        shared = shared_input(x, *self.readers())
        if not hooked("projected", hooks):
            return ((lambda: self.q(shared)), (lambda: self.k(shared)), (lambda: self.v(shared))), hooks
        made = Projections(x, self.q(shared), self.k(shared), self.v(shared))
        made, hooks = run_hooks("projected", block, made, hooks)
        return ((lambda: made.q), (lambda: made.k), (lambda: made.v)), hooks

    def _seen(
        self,
        name: str,
        projection: Projection,
        norm: WanRMSNorm,
        rope: Tensor,
        count: int | None,
        seen: dict[str, Tensor],
    ) -> Projection:
        """The same projection; when it is made, the heads of its first `count` tokens are noted in `seen`, placed."""

        if count == 0:
            return projection

        def made() -> Tensor:
            x = projection()
            seen[name] = norm.placed(x[:, :count], rope[..., :count, :, :], self.heads)
            return x

        return made

    def _fused(self, attention: Attention, shard: Shard, *, rows: bool) -> Callable[..., Tensor | Fp8Rows] | None:
        """The backend's form that takes projections as they are, if it has one.

        In FP8 rows where `o` reads those, and nothing between does not (`rows`).
        """
        backend = shard.fused(attention) if self.fusible else None
        if backend is None:
            return None
        return backend.fused_rows if rows and all_take_rows((self.o,)) else backend.fused


class WanT2VCrossAttention(WanSelfAttention):
    """Attention of video tokens to the text."""

    def readers(self) -> tuple[nn.Module, ...]:
        """Only the queries are of the video tokens."""
        return (self.q,)

    def keys_values(self, text: Tensor) -> KeysValues:
        """Embedded text [B, T, C] -> k, v [B, T, H, D]."""
        shared = shared_input(text, self.k, self.v)
        return KeysValues(self.split(self.norm_k(self.k(shared))), self.split(self.v(shared)))

    def forward(self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: nn.Module) -> tuple[Tensor, Hooks]:
        """x [B, L, C] -> [B, L, C], before the residual."""
        q = self.split(self.norm_q(self.q(x)))
        heads, hooks = run_hooks("cross_attn", block, Heads(q, None, inputs.text.attend(self, q)), hooks)
        return self.project(heads.out), hooks


class WanI2VCrossAttention(WanT2VCrossAttention):
    """Text cross-attention whose module also holds the keys and values of CLIP image tokens."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.k_img = nn.Linear(config.dim, config.dim)
        self.v_img = nn.Linear(config.dim, config.dim)
        self.norm_k_img = WanRMSNorm(config.dim, config.eps)

    def image_keys_values(self, tokens: Tensor) -> KeysValues:
        """Image tokens [B, N, C] -> k, v [B, N, H, D]."""
        shared = shared_input(tokens, self.k_img, self.v_img)
        return KeysValues(self.split(self.norm_k_img(self.k_img(shared))), self.split(self.v_img(shared)))
