"""The protocol by which a conditioning system joins the Wan transformer.

A system is a folder with an `Extension`, a frozen dataclass of sizes that holds no weights, and a `Payload`
(conditioning.py), what its node emits for one run. Weights sit in the module tree under their published names, so that
loading, LoRA, quantization and block swap need no code per system. `docs/adding_a_system.md` builds one.

Shapes: B batch, L tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ..attention import AttentionCall
from .checkpoint import Checkpoint
from .conditioning import Payload
from .config import WanConfig
from .families import Kind, Layout
from .modifier import Modifier
from .shard import Shard
from .tokens import BlockInputs, CrossAttention, Grid, Heads, HeadsRead, ModelInputs, Projections, Tokens


class Transformer(Protocol):
    """What an extension may use of the model that it is part of (modules/model.py)."""

    config: WanConfig
    blocks: nn.ModuleList
    patch_embedding: nn.Module

    def joins(self, payload: Payload) -> bool:
        """Whether the encoded pictures of a payload become channels."""

    def parts(self, shape: Sequence[int]) -> int:
        """In how many pieces the layers that compute every token alone run for tokens of this shape [B, L, ...]."""

    def embed_text(self, text: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Prompts [tokens, text_dim] each -> [B, T, C]."""

    def modulation(self, embedding: Tensor) -> Tensor:
        """Time embedding [B, R, C] -> rows of modulation [B, R, 6, C] float32."""

    def clean_modulation(self) -> Tensor:
        """Modulation [1, 1, 6, C] float32 of time 0: of tokens that hold no noise."""

    def rope(
        self,
        grid: Grid,
        *,
        start: Grid = (0, 0, 0),
        riflex_index: int = 0,
        riflex_frames: int | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Rotations [tokens, D/2, 2] of a grid whose first token is at position `start`; RIFLEx as in `rope_table`."""

    def visit(self, block: nn.Module) -> AbstractContextManager[None]:
        """Inside, the weights of a block, one of `stacks`, are on the device."""


class Block(Protocol):
    """What a traced hook may use of its block: its modules, by their published names."""

    self_attn: nn.Module
    cross_attn: CrossAttention


class Extension:
    """Base of all conditioning systems: subclasses are frozen dataclasses and override what they need.

    The hooks from `self_attn_input` on are traced into the block and pure: (block, value, cond) -> (value, cond);
    strength is data (a 0-d tensor in cond), activity is structure (None where idle), and scratch between two hooks of
    a block flows through cond. What a subclass does not override costs nothing.

    weightless: its traced hooks read no module of its own in the block, so that blocks of other systems run them, too.
    tokenwise: its `cross_attn` gives every token the same wherever it lies, so that it may see some of them at a time.
    takes_sums: which of `before_cross_attn` and `after_cross_attn` take a `Residual`, too, a sum that the norm behind
    it adds up, and may then return one. Where any other hook does not, all get tensors.
    file, other_files: the module file that brings its weights, and files that its other nodes load.
    layout: where the sizes of a model are whose own layers this system replaces.
    lora_layers: shell patterns of the layers in LoRA files that are this system's own weights.
    """

    payload: ClassVar[type[Payload]]
    weightless: ClassVar[bool] = False
    tokenwise: ClassVar[bool] = False
    takes_sums: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}
    file: ClassVar[Kind | None] = None
    other_files: ClassVar[tuple[Kind, ...]] = ()
    high_precision: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[Layout | None] = None
    lora_layers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """The extension whose weights are among these tensor shapes (published names), or None."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is detected.")

    @classmethod
    def beside(cls, checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint] | None:
        """The model that runs beside the transformer (`InTurns`), on the meta device, and its file by the names in it.

        checkpoint: a file of the kind `file`. None: the system has no such model.
        """
        return None

    def owns(self, key: str) -> bool:
        """Whether the published key belongs to this system."""
        return False

    def at_strength(self, strength: float) -> Self:
        """The same with the strength of the LoRA file that its weights are from."""
        return self

    def build(self, model: Transformer) -> None:
        """Add this system's modules to `model` under their published names (called on the meta device)."""

    @classmethod
    def published(cls, key: str) -> str:
        """The published name of a tensor that some files name otherwise."""
        return key

    def modifiers(self) -> tuple[Modifier, ...]:
        """What changes every run of a model that has this system, within what is connected to the sampler."""
        return ()

    def stacks(self, model: Transformer) -> Mapping[str, nn.ModuleList]:
        """Block lists of its own, by name: swapped, compiled, quantized and filtered like `blocks`."""
        return {}

    def latents(self, model: Transformer, payload: Payload, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Eager: what the patch embedding reads, [B, C, F, H, W]: channels joined, frames replaced; F, H, W stay."""
        return latents

    def prepare(
        self, model: Transformer, payload: Payload, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, object | None]:
        """Eager, once a forward: the tokens to go on with, and this system's state; None means idle from here on."""
        return tokens, payload

    def on(self, state: object, shard: Shard) -> object:
        """Eager, once a forward: the state for the tokens of this part of the sequence, where it has any per token.

        Grids, token ranges and tensors with a token axis are the whole sequence's in `prepare` and the part's from here
        on; whatever needs the whole keeps the shard, and asks it.
        """
        return state

    def block_cond(self, state: object, index: int) -> NamedTuple | None:
        """Eager: the tensors that the traced hooks of block `index` read; None leaves the block alone."""
        return state

    def skips(self, state: object, index: int) -> bool:
        """Eager: whether this forward goes around block `index`."""
        return False

    def companions(self, model: Transformer, index: int) -> tuple[nn.Module, ...]:
        """Eager: blocks of `stacks` that block `index` of the model runs itself, so that they must be there with it."""
        return ()

    def beside_block(self, model: Transformer, index: int, x: Tensor, inputs: BlockInputs, state: object) -> Tensor:
        """Eager: as `after_block` and before it, while the block is on the device: for modules put into the block."""
        return x

    def after_block(self, model: Transformer, index: int, x: Tensor, inputs: BlockInputs, state: object) -> Tensor:
        """Eager: the tokens [B, L, C] behind block `index`, changed or not. Not called for a skipped block."""
        return x

    def after_blocks(self, model: Transformer, x: Tensor, state: object) -> None:
        """Eager, once a forward: looks at all tokens [B, L, C] behind the last block, appended ones included.

        A step cache may have left the blocks out; x is then what it stands in with.
        """

    def self_attn_input(self, block: Block, x: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """What self-attention projects, normed and modulated, [B, L, C]. It costs as `projected` does."""
        return x, cond

    def projected(self, block: Block, value: Projections, cond: NamedTuple) -> tuple[Projections, NamedTuple]:
        """What self-attention projects, before norms and positions. It costs the FP8 input that q, k and v share."""
        return value, cond

    def attend(self, block: Block, call: AttentionCall, cond: NamedTuple) -> tuple[AttentionCall, NamedTuple]:
        """q, k, v of self-attention, before the kernel: always all tokens, in order, perhaps of some of the heads."""
        return call, cond

    def reads_heads(self, cond: NamedTuple) -> HeadsRead | None:
        """What `self_attn` reads or changes; None: it does nothing.

        A fused kernel keeps q and k to itself: those that are read are placed once more. A result that is read is in
        16 bits, and rounded to FP8 for the output layer after that.
        """
        return HeadsRead()

    def self_attn(self, block: Block, heads: Heads, cond: NamedTuple) -> tuple[Heads, NamedTuple]:
        """Output heads of self-attention, before the output projection."""
        return heads, cond

    def self_attn_output(self, block: Block, y: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Projected output of self-attention, before gate and residual, [B, L, C]."""
        return y, cond

    def before_cross_attn(self, block: Block, x: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Residual stream behind self-attention, [B, L, C]."""
        return x, cond

    def cross_attn(self, block: Block, heads: Heads, cond: NamedTuple) -> tuple[Heads, NamedTuple]:
        """Output heads of text cross-attention, before the output projection."""
        return heads, cond

    def after_cross_attn(self, block: Block, x: Tensor, cond: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Residual stream after text cross-attention, [B, L, C]. Later hooks may change what this reads or returns."""
        return x, cond


TRACED = (
    "self_attn_input", "projected", "attend", "self_attn", "self_attn_output", "before_cross_attn", "cross_attn",
    "after_cross_attn",
)  # fmt: skip
Hooks = tuple[tuple[Extension, NamedTuple], ...]


def overrides(extension: Extension, name: str) -> bool:
    """Whether this extension has a hook `name` of its own."""
    return getattr(type(extension), name) is not getattr(Extension, name)


def acts(name: str, extension: Extension, cond: NamedTuple) -> bool:
    """Whether the hook `name` of an active extension does anything."""
    return overrides(extension, name) and (name != "self_attn" or extension.reads_heads(cond) is not None)


def hooked(name: str, hooks: Hooks) -> bool:
    """Whether the hook `name` of any active extension does anything."""
    return any(acts(name, extension, cond) for extension, cond in hooks)


def heads_read(hooks: Hooks) -> HeadsRead:
    """What the `self_attn` hooks of active extensions read together."""
    read = HeadsRead(queries=0, keys=0, result=False)
    for extension, cond in hooks:
        if acts("self_attn", extension, cond):
            read = read.joined(extension.reads_heads(cond))
    return read


def run_hooks(name: str, block: Block, value: object, hooks: Hooks) -> tuple[object, Hooks]:
    """Pass `value` through the hook `name` of every active extension, in registry order.

    Extensions whose hook does nothing are skipped, and vanish from a traced graph.
    """
    after = []
    for extension, cond in hooks:
        if acts(name, extension, cond):
            value, cond = getattr(extension, name)(block, value, cond)
        after.append((extension, cond))
    return value, tuple(after)
