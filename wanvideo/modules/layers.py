"""Norms, modulation and embeddings that the Wan transformer is made of. Norms compute in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import triton_runs, with_float64
from ...kernels.fp8_rows import Fp8Rows, gelu_quantize, norm_quantize
from ...kernels.gated_residual import gated_residual as gated_residual_fused
from ...kernels.modulated_norm import norm_modulate, rms_norm, rms_norm_eager
from ...kernels.norm_rope_fp8 import norm_rope, rope_heads
from ...kernels.residual_norm import residual_norm, residual_norm_quantize
from ...kernels.rope import apply_rope
from ...quantized.linear import QuantizedLinear, all_take_rows, is_plain
from ...tensor_layout import dense
from .stretches import parts_of, stretched

MAX_PERIOD = 10000.0
# Eager norms hold this many tokens in float32 at once, and not a second and third copy of all of them.
WIDE_TOKENS = 2048


class WanRMSNorm(nn.Module):
    """RMS norm over all channels (all heads at once), with a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in x's dtype."""
        if x.dim() == 3 and x.is_cuda and _runs_fused(x) and triton_runs(x.device):
            return rms_norm(x, self.weight, self.eps)
        return _in_stretches(lambda part: rms_norm_eager(part, self.weight, self.eps), x)

    def placed(self, x: Tensor, rope: Tensor, heads: tuple[int, int]) -> Tensor:
        """x [B, L, C], normed, as heads [B, L, H, D] at their positions, rope [L or (B, L), D/2, 2]; heads: (H, D)."""
        if _runs_fused(x):
            return norm_rope(x, self.weight, rope, self.eps, heads[0])
        return apply_rope(dense(self(x)).unflatten(-1, heads), rope)


class HeadRMSNorm(WanRMSNorm):
    """RMS norm of each head by itself, with one weight [D] for all."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in x's dtype; C is a multiple of D."""
        by_head = dense(x).unflatten(-1, (-1, self.weight.shape[0]))
        return super().forward(by_head.flatten(1, -2)).view(x.shape)

    def placed(self, x: Tensor, rope: Tensor, heads: tuple[int, int]) -> Tensor:
        """As the parent's."""
        return turned_heads(self(x).unflatten(-1, heads), rope)


def turned_heads(x: Tensor, rope: Tensor) -> Tensor:
    """Heads x [B, L, H, D] at the positions of rope [L or (B, L), D/2, 2]."""
    return rope_heads(x, rope) if _runs_fused(x) else apply_rope(x, rope)


class WanLayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32, returned in the input's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in x's dtype."""
        if self.elementwise_affine and x.dim() == 3 and _runs_fused(x) and triton_runs(x.device):
            return norm_modulate(x, self.weight.float(), self.bias.float(), self.eps)
        return _in_stretches(lambda part: self.widened(part).to(part.dtype), x)

    def widened(self, x: Tensor) -> Tensor:
        """The same in float32, for a modulation that follows."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)


def per_token(rows_of: Tensor, rows: Tensor | None) -> Tensor:
    """Modulation [B, R, C] as it applies to tokens: [B, 1, C] for one row, else [B, L, C]."""
    return rows_of if rows is None else rows_of[:, rows]


def at_tokens(modulation: Sequence[Tensor], rows: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate [B, R, C] as they apply to these tokens; rows [L]: of all tokens.

    One by one: in a comprehension a slice is a constant to the compiler, and every length would be a graph of its own.
    """
    shift, scale, gate = modulation
    rows = None if rows is None else rows[tokens]
    return per_token(shift, rows), per_token(scale, rows), per_token(gate, rows)


def modulate(
    norm: WanLayerNorm, x: Tensor, shift: Tensor, scale: Tensor, readers: Sequence[nn.Module] = ()
) -> Tensor | Fp8Rows:
    """norm(x) * (1 + scale) + shift for a norm without weights; x [B, L, C], shift and scale [B, 1 or L, C] float32.

    Rounded once: to FP8 rows where all `readers`, the linear layers that take it, read them; else to x's dtype.
    """
    if readers and all_take_rows(readers):
        return norm_quantize(x, 1 + scale, shift, norm.eps)
    if _runs_fused(x):
        return norm_modulate(x, 1 + scale, shift, norm.eps)
    return torch.addcmul(shift, norm.widened(x), 1 + scale).to(x.dtype)


def normalize(norm: WanLayerNorm, x: Tensor, readers: Sequence[nn.Module] = ()) -> Tensor | Fp8Rows:
    """norm(x) for a norm with weights, rounded as in `modulate`."""
    if readers and all_take_rows(readers):
        return norm_quantize(x, norm.weight.float(), norm.bias.float(), norm.eps)
    return norm(x)


class Residual:
    """x + y * gate (None: x + y) that is not added up yet: a norm that reads it next does both in one pass.

    x, y [B, L, C]; gate float32, 0-d or [B, 1 or L, C]. Adding gives them away: frames that hold this object hold no
    tensors behind it.
    """

    def __init__(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> None:
        self._terms = [(x, y, gate)]

    def added(self) -> Tensor:
        """The sum, rounded once to x's dtype."""
        x, y, gate = self._terms.pop()
        return x + y if gate is None else gated_residual(x, y, gate)

    def modulated(
        self, norm: WanLayerNorm, shift: Tensor, scale: Tensor, readers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor | Fp8Rows]:
        """The sum, and `modulate` of it."""
        return self._normed(1 + scale, shift, norm.eps, readers)

    def normalized(self, norm: WanLayerNorm, readers: Sequence[nn.Module] = ()) -> tuple[Tensor, Tensor | Fp8Rows]:
        """The sum, and `normalize` of it."""
        return self._normed(norm.weight.float(), norm.bias.float(), norm.eps, readers)

    def _normed(
        self, gain: Tensor, shift: Tensor, eps: float, readers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor | Fp8Rows]:
        kernel = residual_norm_quantize if readers and all_take_rows(readers) else residual_norm
        return kernel(*self._terms.pop(), gain, shift, eps)


def added_by_norm(x: Tensor) -> bool:
    """Whether a `Residual` of such tokens is worth making: where one kernel adds and norms."""
    return _runs_fused(x) and triton_runs(x.device)


def _runs_fused(x: Tensor) -> bool:
    """Whether fewer, larger kernels win: on a GPU, unless a compiler fuses or gradients are needed."""
    return x.is_cuda and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _in_stretches(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """norm(x) for x [B, L, C] of any length, where no compiler sees to it that nothing wide is stored."""
    if x.dim() != 3 or not _runs_fused(x):
        return norm(x)
    return stretched(lambda tokens: norm(x[:, tokens]), x.shape[1], parts_of(x.shape[1], WIDE_TOKENS) or 1)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; the GELU gives FP8 rows where the second layer reads them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim))

    def readers(self) -> tuple[nn.Module, ...]:
        """The linear layers that read its input."""
        return (self[0],)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., C] -> [..., C]."""
        return self[2](self._hidden(x))

    def _hidden(self, x: Tensor | Fp8Rows) -> Tensor | Fp8Rows:
        first, activation, second = self
        if all_take_rows((second,)):
            return gelu_quantize(first(x))
        return linear_gelu(x, first) if _has_gelu_epilogue(x, first) else activation(first(x))


def _has_gelu_epilogue(x: Tensor | Fp8Rows, layer: nn.Module) -> bool:
    """Whether cuBLAS applies the GELU (its tanh form) within the product."""
    if isinstance(x, Fp8Rows) or isinstance(layer, QuantizedLinear) or not is_plain(layer) or layer.bias is None:
        return False
    return _runs_fused(x) and x.dtype == layer.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU (tanh form) of the layer, 16 bits on a GPU: no pass of its own over the largest activation of a block."""
    rows = torch._addmm_activation(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], layer.out_features)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate with a float32 gate, [B, 1 or L, C] or 0-d, rounded once to x's dtype."""
    if _runs_fused(x):
        return gated_residual_fused(x, y, gate)
    return torch.addcmul(x, y, gate).to(x.dtype)


def steered(
    x: Tensor, states: Tensor, projection: nn.Module, strength: float, *, first: int = 0, parts: int = 1
) -> Tensor:
    """x [B, L, C] with `strength` times the projection of states [B, n, D] added to its tokens from `first` on.

    In pieces, as a projection, its product and the sum for all tokens would be three activations.
    """
    end = first + states.shape[1]
    video = x[:, first:end]

    def added(tokens: slice) -> Tensor:
        return video[:, tokens] + projection(states[:, tokens].contiguous()).to(x.dtype) * strength

    result = stretched(added, states.shape[1], parts)
    return result if result.shape == x.shape else torch.cat((x[:, :first], result, x[:, end:]), dim=1)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Cosines then sines of timestep [...] at dim / 2 frequencies: [..., dim] float32, computed in float64."""
    half, place = dim // 2, with_float64(timestep.device)
    exponents = torch.arange(half, dtype=torch.float64, device=place) / half
    angles = timestep.to(place).double().unsqueeze(-1) * MAX_PERIOD**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(timestep.device)


class Head(nn.Module):
    """Last norm, modulation and projection to patches of the velocity."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, embedding: Tensor, rows: Tensor | None, parts: int = 1) -> Tensor:
        """x [B, L, C], time embedding [B, R, C] float32, rows [L] or None -> [B, L, patch channels].

        parts: how many pieces the tokens are computed in.
        """
        shift, scale = self.modulated(embedding)

        def projected(tokens: slice) -> Tensor:
            places = None if rows is None else rows[tokens]
            return self.head(modulate(self.norm, x[:, tokens], per_token(shift, places), per_token(scale, places)))

        return stretched(projected, x.shape[1], parts)

    def modulated(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """Rows of shift and scale [B, R, C] float32 of the time embedding [B, R, C]."""
        return (self.modulation.float().unsqueeze(1) + embedding.unsqueeze(2)).unbind(2)


class TimeProjection(nn.Sequential):
    """Time embedding [B, R, C] -> rows of modulation [B, R, 6, C]: shift, scale, gate of attention and feed-forward."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, R, C] -> [B, R, 6, C]."""
        return super().forward(embedding).unflatten(-1, (6, -1))
