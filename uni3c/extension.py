"""Uni3C (Cao et al. 2025): a controlnet steers the camera by a video rendered along its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sdpa
from ..wanvideo.checkpoint import Checkpoint
from ..wanvideo.compilation import compiled
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modules.layers import steered
from ..wanvideo.modules.model import WanModel
from ..wanvideo.rope import rope_table
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens, video_tokens
from .controlnet import (
    KIND,
    MASK_STRIDE,
    READ_CHANNELS,
    Uni3CControlnet,
    Uni3CModel,
    Uni3CSizes,
    joined_latents,
    renamed,
    resized,
    unfilled,
)


@dataclass(frozen=True)
class Uni3CArgs(Payload):
    """Socket UNI3C_EMBEDS.

    render [1, c, F, h, w]: the rendered video through the VAE. strength, and the part of the steps (0..1) in which it
    acts. mask [1, 1, T, H, W]: where the render is valid, for files that read a mask alone. offload: the controlnet
    waits in main memory and comes block by block.
    """

    controlnet: Uni3CModel
    render: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    offload: bool = True
    needs: ClassVar[str] = "Uni3C works with every Wan model of its width; this one was built without extensions."

    def window(self, window: Window) -> Self:
        """The window's frames of the render, which is stretched to the length of the run, and of the mask.

        Raises ValueError where one of them ends before the window does.
        """
        render = self.render
        if window.total is not None:
            render = resized(render, (window.total, *render.shape[3:]))
        places = window.latents_in(render.shape[2])
        self._check_length("render_latent", render.shape[2], max(places) + 1)
        mask = self.mask
        if mask is not None:
            pixels = window.pixels_in(mask.shape[2])
            self._check_length("render_mask", mask.shape[2], max(pixels) + 1)
            mask = mask[:, :, pixels]
        return replace(self, render=render[:, :, places], mask=mask)

    @staticmethod
    def _check_length(name: str, frames: int, wanted: int) -> None:
        if frames < wanted:
            raise ValueError(f"The {name} of Uni3C has {frames} frames but the video needs {wanted}: render all of it.")

    @contextmanager
    def active(self, *, swapped: bool) -> Iterator[None]:
        """Holds the controlnet beside the transformer, all of it unless it is offloaded; compiles where asked."""
        with ExitStack() as stack:
            stack.enter_context(self.controlnet.held(streamed=self.offload))
            stack.enter_context(compiled((self.controlnet.module.controlnet_blocks,), self.controlnet.compile))
            yield


@dataclass
class Steering:
    """The controlnet's way through one forward: its tokens [B, L, D] behind `done` of its blocks; shard: of these."""

    payload: Uni3CArgs
    embedding: Tensor
    rope: Tensor
    x: Tensor
    done: int = 0
    shard: Shard = WHOLE


@dataclass(frozen=True)
class Uni3C(Extension):
    """Present in every model, idle without its payload: the weights are a model of their own."""

    payload: ClassVar[type] = Uni3CArgs
    file: ClassVar[Kind] = KIND

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Needs no weights of the transformer's."""
        return cls()

    @classmethod
    def beside(cls, checkpoint: Checkpoint) -> tuple[Uni3CControlnet, Checkpoint]:
        """The controlnet."""
        checkpoint = checkpoint.renamed(renamed)
        return unfilled(Uni3CSizes.of(checkpoint), sdpa()), checkpoint

    def prepare(
        self, model: WanModel, payload: Uni3CArgs, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Steering | None]:
        """Embeds latents and render; idle outside its steps and at strength 0. Raises ValueError for other sizes."""
        if payload.strength == 0 or not inputs.step.within(payload.start, payload.end):
            return tokens, None
        module = payload.controlnet.module
        _check_sizes(payload, model)
        mask = None if payload.mask is None else _fitted_mask(payload.mask, tokens.latents.shape)
        with payload.controlnet.turn(0, tokens.x.device):
            x = module.embed(joined_latents(tokens.latents, payload.render), mask, model.parts(tokens.x.shape))
        rope = rope_table(tokens.grid, module.sizes.config.head_dim, device=tokens.x.device)
        return tokens, Steering(payload, tokens.embedding, rope, x)

    def on(self, state: Steering, shard: Shard) -> Steering:
        """The controlnet's tokens are those of the video."""
        x, rope = shard.take(state.x), shard.take(state.rope, dim=0)
        return replace(state, x=x, rope=rope, shard=shard.first(state.x.shape[1]))

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Steering) -> Tensor:
        """Adds the state of the controlnet's block of the same number to the video tokens."""
        owner, module = state.payload.controlnet, state.payload.controlnet.module
        if index >= len(module.controlnet_blocks):
            return x
        count = video_tokens(inputs.grid)
        rows = None if inputs.rows is None else inputs.rows[:count]
        own = inputs._replace(rope=state.rope, rows=rows, attention=None, shard=state.shard)
        # More than one where the transformer went around blocks: the controlnet's own chain has no gaps.
        for place in range(state.done, index + 1):
            with owner.turn(1 + place, x.device):
                state.x = module.controlnet_blocks[place](state.x, state.embedding, own)
                if place == index:
                    projection = module.proj_out[place]
                    x = steered(x, state.x, projection, state.payload.strength, parts=inputs.parts)
        state.done = index + 1
        return x


def _check_sizes(payload: Uni3CArgs, model: WanModel) -> None:
    sizes, dim = payload.controlnet.module.sizes, model.config.dim
    if {sizes.out_dim, sizes.time_dim} != {dim}:
        raise ValueError(
            f"{payload.controlnet.path.name} steers transformers of {sizes.out_dim} channels (5120 are the 14B "
            f"models), but this one has {dim}: choose a model of that size."
        )
    wanted, channels = sizes.config.in_dim - READ_CHANNELS, payload.render.shape[1]
    if channels != wanted:
        raise ValueError(
            f"The render_latent of Uni3C has {channels} channels but {payload.controlnet.path.name} reads {wanted}: "
            "encode the rendered video with the VAE of the model."
        )


def _fitted_mask(mask: Tensor, latents: torch.Size) -> Tensor:
    """The mask [1, 1, T, H, W] at the pixels of the latents [B, C, F, h, w], 0 or 1."""
    frames, height, width = latents[2:]
    if mask.shape[2] != MASK_STRIDE[0] * (frames - 1) + 1:
        raise ValueError(
            f"The render_mask of Uni3C has {mask.shape[2]} frames but the video has "
            f"{MASK_STRIDE[0] * (frames - 1) + 1}: give one mask a frame."
        )
    size = (mask.shape[2], height * MASK_STRIDE[1], width * MASK_STRIDE[2])
    return (F.interpolate(mask, size=size, mode="nearest") >= 0.5).to(mask.dtype)


EXTENSION = Uni3C
