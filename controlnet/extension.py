"""TheDenk's controlnets as an extension: states of a model of its own behind every few blocks of the transformer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from ..wanvideo.checkpoint import Checkpoint
from ..wanvideo.conditioning import Payload, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modules.layers import steered
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens
from .controlnet import KIND, ControlnetModel, WanControlnet, unfilled

log = logging.getLogger("wanvideo")


@dataclass(frozen=True)
class ControlArgs(Payload):
    """What `WanVideo Controlnet Apply` gives a model.

    control [1, 3, T, H, W] in -1..1: the control video. strength; stride: blocks of the transformer to one of the
    controlnet. start, end: the part of the steps (0..1) in which it acts, its end excluded. leading, trailing: latents
    at either end that are references, which no frame of the video stands for.
    """

    controlnet: ControlnetModel
    control: Tensor
    strength: float = 1.0
    stride: int = 3
    start: float = 0.0
    end: float = 1.0
    leading: int = 0
    trailing: int = 0
    needs: ClassVar[str] = "A controlnet works with every model of its width; this one was built without extensions."

    def window(self, window: Window) -> Self:
        """The window's frames; what is longer than the video is left out. Raises ValueError where it is shorter."""
        frames = self.control.shape[2]
        places = window.pixels_in(frames)
        wanted = max(places) + 1
        if frames < wanted:
            raise ValueError(
                f"The control video has {frames} frames but the video has {'' if window.whole else 'at least '}"
                f"{wanted}: give WanVideo Controlnet Apply as many control_images as the video has frames."
            )
        if window.whole and frames > wanted:
            log.info("The control video has %d frames, of which the first %d are used.", frames, wanted)
        control = self.control[:, :, places]
        return replace(self, control=control, leading=window.leading, trailing=window.trailing)

    def active(self, *, swapped: bool) -> AbstractContextManager[None]:
        """Holds the controlnet beside the transformer, and lets it wait where the transformer's blocks do."""
        return self.controlnet.held(streamed=swapped)

    def acts(self, step: Step) -> bool:
        """Whether the step lies in the part of the schedule, as the authors count: its end is not in it."""
        return self.strength != 0 and self.start <= step.index / step.total < self.end


@dataclass
class Steering:
    """The controlnet's way through one forward: its tokens [B, L, D] behind `done` of its blocks.

    first: place of the first of these tokens in the transformer's sequence.
    """

    payload: ControlArgs
    inputs: BlockInputs
    x: Tensor
    first: int
    done: int = 0


@dataclass(frozen=True)
class Controlnet(Extension):
    """Present in every model, idle without its payload: the weights are a model of their own."""

    payload: ClassVar[type] = ControlArgs
    file: ClassVar[Kind] = KIND

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Needs no weights of the transformer's."""
        return cls()

    @classmethod
    def beside(cls, checkpoint: Checkpoint) -> tuple[WanControlnet, Checkpoint]:
        """The controlnet."""
        return unfilled(checkpoint), checkpoint

    def prepare(
        self, model: WanModel, payload: ControlArgs, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Steering | None]:
        """Embeds noise, prompt and control video; idle outside its steps. Raises ValueError for other sizes.

        Passes without the prompt are steered by what the controlnet makes of the prompt, as the authors do.
        """
        if not payload.acts(inputs.step):
            return tokens, None
        owner, module = payload.controlnet, payload.controlnet.module
        _check_sizes(payload, model)
        frames = slice(payload.leading, inputs.latents.shape[2] - payload.trailing)
        noise = inputs.latents[:, : model.config.out_dim, frames]
        timestep = inputs.timestep if inputs.timestep.dim() == 1 else inputs.timestep[:, frames]
        prompts = inputs.text if inputs.prompts is None else inputs.prompts
        with owner.turn(0, tokens.x.device):
            x, own = module.embed(noise, timestep, prompts, payload.control)
        first = payload.leading * tokens.grid[1] * tokens.grid[2]
        return tokens, Steering(payload, own, x, first)

    def on(self, state: Steering, shard: Shard) -> Steering:
        """The controlnet has the same places of its frames, which are the video's without references."""
        own, part = state.inputs, shard.first(state.x.shape[1])
        inputs = own._replace(
            rope=part.take(own.rope, dim=0),
            rows=None if own.rows is None else part.take(own.rows, dim=0),
            grid=part.grid(own.grid),
            shard=part,
        )
        return replace(state, inputs=inputs, x=part.take(state.x), first=shard.count(state.first))

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Steering) -> Tensor:
        """Adds the next state of the controlnet behind every block whose number the stride divides."""
        owner, module = state.payload.controlnet, state.payload.controlnet.module
        last, rest = divmod(index, state.payload.stride)
        if rest or last >= len(module.blocks):
            return x
        # More than one where the transformer went around blocks: the controlnet's own chain has no gaps.
        for place in range(state.done, last + 1):
            with owner.turn(1 + place, x.device):
                state.x = module.blocks[place](state.x, state.inputs._replace(parts=inputs.parts))
                if place == last:
                    projection, strength = module.controlnet_blocks[place], state.payload.strength
                    x = steered(x, state.x, projection, strength, first=state.first, parts=inputs.parts)
        state.done = last + 1
        return x


def _check_sizes(payload: ControlArgs, model: WanModel) -> None:
    sizes, config = payload.controlnet.module.sizes, model.config
    if (sizes.out_dim, sizes.config.out_dim) != (config.dim, config.out_dim):
        raise ValueError(
            f"{payload.controlnet.path.name} is for transformers of {sizes.out_dim} channels and "
            f"{sizes.config.out_dim} latent channels (1536 and 16: 1.3B, 5120 and 16: 14B, 3072 and 48: 5B), but this "
            f"one has {config.dim} and {config.out_dim}: choose the controlnet of the model's size."
        )


EXTENSION = Controlnet
