"""Audio attention to one speaker with its large products folded into the few audio tokens.

Nothing stands between the stream and its scores but linear maps (no norm of queries, no rotation), nor between values
and the stream. So Wq and Wo meet the T keys and values of a frame instead of its S video tokens:

    score(s, t, h) = (x(s) Wq(h) + bq(h)) . k(t, h) = x(s) . (Wq(h) k(t, h)) + bq(h) . k(t, h)
    out(s) = sum over t, h of p(s, t, h) (Wo(h) v(t, h)), plus bo

That is T / D + T / S of the work of the two products of all video tokens, and their results are never stored.

Shapes: F frames, S tokens a frame, T audio tokens a frame, C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ..kernels import op_name
from ..kernels.head_softmax import head_softmax
from ..quantized.linear import is_plain, weight_of

# Of the work of the products that it replaces. FP8 products run at twice the rate of folded ones.
WORTH = 0.4


def is_worth_it(keys: int, head_dim: int, places: int) -> bool:
    """Whether folding wins for so many audio tokens and video tokens a frame, against products in FP8 too."""
    return keys / head_dim + keys / places <= WORTH


class Folding(NamedTuple):
    """Weights of queries and output by heads, [H, D, C]; biases [H, D] and [C], or None."""

    query: Tensor
    query_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None

    @classmethod
    def of(cls, query: nn.Linear, out: nn.Linear, heads: tuple[int, int], dtype: torch.dtype) -> Self | None:
        """Of the projections of queries and output; None where one of them adds something, such as a LoRA."""
        if not (is_plain(query) and is_plain(out)):
            return None
        bias = None if query.bias is None else query.bias.unflatten(0, heads)
        by_head = weight_of(query, dtype).unflatten(0, heads), weight_of(out, dtype).t().unflatten(0, heads)
        return cls(by_head[0], bias, by_head[1], out.bias)

    def add(self, stream: Tensor, normed: Tensor, k: Tensor, v: Tensor, gain: Tensor) -> None:
        """Adds `gain` times the audio attention of `normed` to the stream, in place.

        stream, normed [F * S, C], the stream contiguous; k, v [F, T, H, D]; gain 0-d.
        """
        frames, _, heads, _ = k.shape
        keys, bias = self._keys(k)
        weights = torch.bmm(normed.unflatten(0, (frames, -1)), keys.transpose(1, 2))
        del keys
        head_softmax(weights, bias, gain, heads)
        stream.unflatten(0, (frames, -1)).baddbmm_(weights, self._values(v))

    def _keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """What the stream is multiplied by [F, T * H, C], and what is added to its scores [F, T * H], float32."""
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        # Softmax does not see what all keys have in common, and scores, which are rounded, need not hold it.
        k = ((wide - wide.mean(dim=1, keepdim=True)) * k.shape[-1] ** -0.5).to(k.dtype)
        if self.query_bias is None:
            bias = wide.new_zeros(k.shape[:3])
        else:
            bias = (k.to(wide.dtype) * self.query_bias.to(wide.dtype)).sum(dim=-1)
        return _fold(k.flatten(0, 1), self.query).view(k.shape[0], -1, self.query.shape[2]), bias.flatten(1)

    def _values(self, v: Tensor) -> Tensor:
        """What the weights are multiplied by, [F, T * H, C]."""
        folded = _fold(v.flatten(0, 1), self.out)
        if self.out_bias is not None:
            # The weights of a head add up to one (times the gain), those of the first as well as any.
            folded[:, 0] += self.out_bias
        return folded.view(v.shape[0], -1, self.out.shape[2])


@torch.library.custom_op(op_name("fold"), mutates_args=())
def _fold(heads: Tensor, weight: Tensor) -> Tensor:
    """Heads [R, H, D], each times its own weight [H, D, C]: [R, H, C]."""
    # An operator, as torch.compile does not take a strided `out`; without, a copy of all would follow.
    out = torch.empty((*heads.shape[:2], weight.shape[2]), dtype=heads.dtype, device=heads.device)
    torch.bmm(heads.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


@_fold.register_fake
def _(heads: Tensor, weight: Tensor) -> Tensor:
    return heads.new_empty((*heads.shape[:2], weight.shape[2]))
