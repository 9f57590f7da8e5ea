"""The protocol by which a conditioning system (MultiTalk, CLIP image, VACE, ...) joins the Wan transformer.

A system is one folder or file with an `Extension`, a frozen dataclass that holds sizes but no weights. Its weights sit
in the module tree under their published names, so loading, LoRA, quantisation and block swap need no code per system.

Shapes: B batch, L tokens, C channels, H heads, D head size, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..attention import Attention
    from .modules.model import WanAttentionBlock, WanModel

Span = tuple[tuple[int, int], tuple[int, int]]


class AttentionCall(NamedTuple):
    """Self-attention before the kernel: q, k, v [B, L, H, D].

    spans: static (query range, key range) pairs; empty means that all tokens attend to all. k_lens: how many keys of
    each batch entry count, of which the rest is padding; empty means all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spans: tuple[Span, ...] = ()
    k_lens: tuple[int, ...] = ()


class Heads(NamedTuple):
    """Attention after the kernel and before the output projection: q, k, out [B, L, H, D].

    In self-attention q and k are post-RoPE, and None unless the `reads_heads` of an active extension asks for them.
    In cross-attention q is the normalised query and k is None.
    """

    q: Tensor | None
    k: Tensor | None
    out: Tensor


class KeysValues(NamedTuple):
    """Keys and values of a cross-attention, [B, T, H, D]."""

    k: Tensor
    v: Tensor


class BlockInputs(NamedTuple):
    """What every block reads. mod [B, R, 6, C] float32; rows [L] token -> row of mod, None where R is 1.

    rope [L, D/2, 2] cosine and sine, float32; text: what the block's cross-attention made of the prompt; grid (frames,
    height, width) in tokens; attention: the backend of self-attention in this step, None for the module's own.
    """

    mod: Tensor
    rows: Tensor | None
    rope: Tensor
    text: KeysValues
    grid: tuple[int, int, int]
    attention: Attention | None = None


class Tokens(NamedTuple):
    """The sequence on its way to the blocks; `prepare` may add tokens, rows and positions together.

    x [B, L, C]; mod [B, R, 6, C]; rows [L] or None; rope [L, D/2, 2]; grid of the video tokens, which come first.
    """

    x: Tensor
    mod: Tensor
    rows: Tensor | None
    rope: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in the schedule a forward pass is. Read by `prepare` only: none of it may reach a traced hook.

    index counts from 0 within the whole schedule of `total` steps; in_run within this sampler's part of it.
    """

    index: int = 0
    total: int = 1
    in_run: int = 0

    @property
    def percent(self) -> float:
        """Progress from 0 (first step) to 1 (last step)."""
        return self.index / max(self.total - 1, 1)


@runtime_checkable
class Payload(Protocol):
    """What a node emits for an extension; all that the sampler and the windows know of a system.

    needs: one sentence for the user whose model lacks the weights: which key is missing, which loader input gives it.
    """

    needs: ClassVar[str]

    def window(self, frames: Sequence[int]) -> Self:
        """The part that belongs to these pixel frames. Itself if all windows have the same: they share what is kept."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """A copy whose floating-point tensors are on `device` in `dtype`."""

    def stack(self, others: Sequence[Self]) -> Self:
        """One payload for a batch: self's batch rows, then each of the others'."""


class RunCache:
    """Keeps what a block makes of its conditions for the length of a run: of a payload (`Extension.once`), of prompts.

    Keyed by the identity of the sources and the block. The sources are held, so that their identity cannot be reused
    while their entries live.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[tuple[int, ...], int], tuple[tuple[object, ...], object]] = {}

    def clear(self) -> None:
        """Keep nothing."""
        self._entries.clear()

    def get(self, sources: tuple[object, ...], index: int, make: Callable[[], object]) -> object:
        """The kept value of (sources, block index); `make` computes it the first time."""
        key = (tuple(id(source) for source in sources), index)
        if key not in self._entries:
            self._entries[key] = (sources, make())
        return self._entries[key][1]


class Extension:
    """Base of all conditioning systems: subclasses are frozen dataclasses and override what they need.

    The hooks below `after_block` are traced into the block and must be pure: (block, value, cond) -> (value, cond).
    A hook that a subclass does not override costs nothing. Strength is data (a 0-d tensor in cond); activity is
    structure (`prepare` returns None when idle). Scratch between two hooks of a block flows through cond.
    """

    payload: ClassVar[type]
    aliases: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """The extension whose weights are among these tensor shapes (published names), or None."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is detected.")

    def build(self, model: WanModel) -> None:
        """Add this system's modules to `model` under their published names (called on the meta device)."""

    def owns(self, key: str) -> bool:
        """Whether the published key belongs to this system."""
        return False

    def blocks(self, model: WanModel) -> Sequence[int]:
        """Indices of the blocks whose hooks run."""
        return range(len(model.blocks))

    def travels_with(self, model: WanModel, index: int) -> tuple[nn.Module, ...]:
        """Modules outside blocks[index] that must be resident with it."""
        return ()

    def prepare(self, model: WanModel, payload: Payload, step: Step, tokens: Tokens) -> tuple[Tokens, object | None]:
        """Eager, once a forward: the tokens to go on with, and this system's state; None means idle."""
        return tokens, payload

    def once(self, block: WanAttentionBlock, state: object, index: int) -> object | None:
        """Eager: what block `index` can keep for the whole run (its K and V), given while the block is resident."""
        return None

    def block_cond(self, state: object, index: int, kept: object | None) -> NamedTuple | None:
        """Eager: the tensors that block `index`'s hooks read; None leaves the block alone."""
        return None

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: object) -> Tensor:
        """Eager: the block's output, changed or not."""
        return x

    def self_attn_input(self, block: WanAttentionBlock, x: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Modulated input of self-attention, [B, L, C]."""
        return x, cond

    def attend(
        self, block: WanAttentionBlock, call: AttentionCall, cond: NamedTuple
    ) -> tuple[AttentionCall, NamedTuple]:
        """q, k, v of self-attention, before the kernel."""
        return call, cond

    def reads_heads(self, cond: NamedTuple) -> bool:
        """Whether `self_attn` needs q and k, which a kernel may otherwise keep to itself."""
        return False

    def uses_self_attn(self, cond: NamedTuple) -> bool:
        """Whether `self_attn` does anything; where not, a kernel may give its result as FP8 rows."""
        return True

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: NamedTuple) -> tuple[Heads, NamedTuple]:
        """Output heads of self-attention, before the output projection."""
        return heads, cond

    def self_attn_output(self, block: WanAttentionBlock, y: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Projected output of self-attention, before gate and residual, [B, L, C]."""
        return y, cond

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: NamedTuple) -> tuple[Heads, NamedTuple]:
        """Output heads of text cross-attention, before the output projection."""
        return heads, cond

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Residual stream after text cross-attention, [B, L, C]."""
        return x, cond


Hooks = tuple[tuple[Extension, NamedTuple], ...]


def hooked(name: str, hooks: Hooks) -> bool:
    """Whether an active extension overrides the hook `name`."""
    return any(getattr(type(extension), name) is not getattr(Extension, name) for extension, _ in hooks)


def heads_are_used(hooks: Hooks) -> bool:
    """Whether anything but the output projection reads what self-attention gives."""
    return hooked("self_attn", tuple((extension, cond) for extension, cond in hooks if extension.uses_self_attn(cond)))


def run_hooks(name: str, block: WanAttentionBlock, value: object, hooks: Hooks) -> tuple[object, Hooks]:
    """Pass `value` through the hook `name` of every active extension, in registry order.

    Extensions that do not override the hook are skipped, and vanish from a traced graph.
    """
    after = []
    for extension, cond in hooks:
        if hooked(name, ((extension, cond),)):
            value, cond = getattr(extension, name)(block, value, cond)
        after.append((extension, cond))
    return value, tuple(after)
