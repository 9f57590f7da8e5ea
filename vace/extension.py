"""VACE (Jiang et al. 2025): blocks of its own turn control videos, masks and references into hints for the main blocks.

Its blocks are a copy of every n-th main block. They start from the video tokens before the first main block plus the
projected context, and each hands a hint to the main block that it was copied from.

Source: ali-vilab/VACE (VaceWanModel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.assign import layer_count
from ..wanvideo.conditioning import Payload, Step, Window
from ..wanvideo.config import WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import at_step
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens

STACK = "vace_blocks"
PATCHES = "vace_patch_embedding"
LATENT_CHANNELS = 16
# Latents of what stays, latents of what is made anew, and the 8x8 mask pixels behind one latent.
CONTEXT_CHANNELS = 2 * LATENT_CHANNELS + 64


@dataclass(frozen=True, kw_only=True)
class VaceContext:
    """One encoded condition.

    latents [1, 96, F, h, w] float32, its references in front; strengths: one a step, the last one holds on; start, end:
    part of the steps (0..1) in which it acts; references: how many of its latent frames are references; skipped: latent
    frames of the video in front of it that it has nothing for (the references of another context).
    """

    latents: Tensor
    strengths: tuple[float, ...] = (1.0,)
    start: float = 0.0
    end: float = 1.0
    references: int = 0
    skipped: int = 0

    def strength(self, step: Step) -> float:
        """Of its hints in this step; 0 outside of its range."""
        return at_step(self.strengths, step) if step.within(self.start, self.end) else 0.0

    def part(self, window: Window) -> VaceContext | None:
        """Its frames of a window, placed there. A picture of the window takes the place of the reference."""
        skipped = max(window.leading - self.references, 0)
        count = self.latents.shape[2]
        places = [place - skipped for place in window.latents if 0 <= place - skipped < count]
        if not places:
            return None
        latents = self.latents[:, :, places]
        if self.references and window.picture is not None:
            latents[:, :LATENT_CHANNELS, 0] = window.picture[:, 0].to(latents)
        return replace(self, latents=latents, skipped=skipped)


@dataclass(frozen=True)
class Vace(Payload):
    """What WanVideoVACEEncode emits: contexts whose hints add up."""

    contexts: tuple[VaceContext, ...]
    needs: ClassVar[str] = (
        "VACE embeds need a model with vace_blocks.0.after_proj.weight: connect WanVideoVACEModelSelect to the "
        "'extra_model' input of WanVideoModelLoader, or load a checkpoint that has VACE merged in."
    )
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self | None:
        """The contexts that have frames in the window."""
        parts = tuple(part for context in self.contexts if (part := context.part(window)) is not None)
        return replace(self, contexts=parts) if parts else None

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Contexts stay in float32, the precision of the patch embedding."""
        moved = (replace(c, latents=c.latents.to(device, torch.float32)) for c in self.contexts)
        return replace(self, contexts=tuple(moved))


class VaceBlock(WanAttentionBlock):
    """A transformer block over context tokens, with a projection of its result to a hint."""

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config, sdpa())
        if first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(self, c: Tensor, inputs: BlockInputs, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """c [B, L, C] -> c and its hint, [B, L, C]. x [B, L, C]: video tokens that the first block starts from."""
        if x is not None:
            c = self.before_proj(c) + x
        c = super().forward(c, inputs, inputs.conds)
        return c, self.after_proj(c)


class Branch:
    """The contexts of one forward on their way through the VACE blocks.

    x [B, L, C]: the tokens before the first main block. contexts: tokens [1, L, C] of each, and its strength. Only
    the tokens that the next block reads are held; a hint is added as soon as it is made. shard: of these tokens.
    """

    def __init__(self, x: Tensor, contexts: Sequence[tuple[Tensor, float]], shard: Shard = WHOLE) -> None:
        self.done = 0
        self._x: Tensor | None = x
        self._length = x.shape[1]
        self._contexts = [tokens for tokens, _ in contexts]
        self._strengths = [strength for _, strength in contexts]
        self._shard = shard

    def on(self, shard: Shard) -> Branch:
        """The part of all these tokens, before the first block ran."""
        contexts = zip(map(shard.take, self._contexts), self._strengths, strict=True)
        return Branch(shard.take(self._x), tuple(contexts), shard.first(self._length))

    def run(self, model: WanModel, block: VaceBlock, inputs: BlockInputs) -> list[Tensor]:
        """The hints [B, L, C] of the next block, one of each context."""
        inputs = self._seen(inputs)
        hints = []
        with model.visit(block):
            for number, tokens in enumerate(self._contexts):
                self._contexts[number], hint = block(tokens, inputs, self._x)
                hints.append(hint)
        self._x = None
        self.done += 1
        return hints

    def add(self, x: Tensor, hints: Sequence[Tensor]) -> Tensor:
        """x [B, N, C] with the hints, times their strengths, on the tokens that the branch knows."""
        known, others = x[:, : self._length], x[:, self._length :]
        for hint, strength in zip(hints, self._strengths, strict=True):
            known = torch.add(known, hint, alpha=strength)
        return torch.cat((known, others), dim=1) if others.shape[1] else known

    def _seen(self, inputs: BlockInputs) -> BlockInputs:
        """Without the tokens that systems behind this one appended."""
        rows = None if inputs.rows is None else inputs.rows[: self._length]
        return inputs._replace(rows=rows, rope=inputs.rope[: self._length], shard=self._shard)


def hinted_blocks(layers: int, blocks: int) -> tuple[int, ...]:
    """The main blocks that get the hints of so many VACE blocks: every n-th, from the first on.

    Raises ValueError if there is no such n.
    """
    places = tuple(range(0, layers, -(-layers // blocks)))
    if len(places) != blocks:
        raise ValueError(
            f"{blocks} VACE blocks cannot be spread evenly over a transformer of {layers} blocks: choose the VACE "
            "module of the same size (14B or 1.3B) as the model."
        )
    return places


@dataclass(frozen=True)
class VaceExtension(Extension):
    """blocks: how many VACE blocks there are; channels: of a context."""

    blocks: int
    channels: int = CONTEXT_CHANNELS
    payload: ClassVar[type] = Vace
    file: ClassVar[Kind] = Kind("VACE module", "WanVideo VACE Module Select", (r"^vace_blocks\.0\.after_proj\.",))

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has VACE blocks."""
        blocks = layer_count(shapes, f"{STACK}.")
        return cls(blocks, shapes.get(f"{PATCHES}.weight", (0, CONTEXT_CHANNELS))[1]) if blocks else None

    def owns(self, key: str) -> bool:
        """The blocks and the patch embedding of contexts."""
        return key.startswith((f"{STACK}.", f"{PATCHES}."))

    def build(self, model: WanModel) -> None:
        """Adds vace_blocks and vace_patch_embedding. Raises ValueError for a module of another size."""
        config = model.config
        hinted_blocks(config.num_layers, self.blocks)
        model.vace_blocks = nn.ModuleList(VaceBlock(config, first=number == 0) for number in range(self.blocks))
        for block in model.vace_blocks:
            block.extensions = model.extensions
        size = config.patch_size
        model.vace_patch_embedding = nn.Conv3d(self.channels, config.dim, kernel_size=size, stride=size)

    def stacks(self, model: WanModel) -> Mapping[str, nn.ModuleList]:
        """The VACE blocks."""
        return {STACK: model.vace_blocks}

    def prepare(
        self, model: WanModel, payload: Vace, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Branch | None]:
        """Tokens of the contexts that act in this step; idle where none does."""
        acting = [(context, strength) for context in payload.contexts if (strength := context.strength(inputs.step))]
        if not acting:
            return tokens, None
        return tokens, Branch(tokens.x, [(self._tokens(model, context, tokens), s) for context, s in acting])

    def on(self, state: Branch, shard: Shard) -> Branch:
        """The VACE blocks share their tokens out as the main blocks do."""
        return state.on(shard)

    def _tokens(self, model: WanModel, context: VaceContext, tokens: Tokens) -> Tensor:
        """A context as tokens [1, L, C] like those of the video, zero where it has nothing for them.

        Raises ValueError if it does not fit the video.
        """
        embedding, (frames, height, width) = model.vace_patch_embedding, tokens.grid
        if context.latents.shape[1] != self.channels:
            raise ValueError(
                f"The VACE embeds have {context.latents.shape[1]} channels but the model reads {self.channels}: encode "
                "them with WanVideoVACEEncode."
            )
        patches = embedding(context.latents.to(embedding.weight.dtype))
        count = context.skipped + patches.shape[2]
        if tuple(patches.shape[3:]) != (height, width) or count > frames:
            raise ValueError(
                f"The VACE embeds are of {tuple(context.latents.shape[2:])} latents (frames, height, width), which do "
                f"not fit a video of {(frames, *(2 * side for side in (height, width)))}: encode them at its size."
            )
        c = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)
        before = context.skipped * height * width
        return F.pad(c, (0, 0, before, tokens.x.shape[1] - before - c.shape[1])).contiguous()

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Branch) -> Tensor:
        """Runs the VACE block whose turn it is, and adds its hints.

        Where a system left out a main block, its VACE block runs late and its hints are lost, as they belong to it.
        """
        hinted = hinted_blocks(len(model.blocks), self.blocks)
        while state.done < self.blocks and hinted[state.done] <= index:
            own = hinted[state.done] == index
            hints = state.run(model, model.vace_blocks[state.done], inputs)
            x = state.add(x, hints) if own else x
        return x


EXTENSION = VaceExtension
