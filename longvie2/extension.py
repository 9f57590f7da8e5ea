"""LongVie 2 (Gao et al. 2025): two control videos, dense (depth) and sparse (point tracks), and history frames.

Half as wide copies of the first blocks sit in these and carry each control video along; behind a block, what they made
of both is added to the video. Frames of an earlier clip are read as tokens in front of the video.

Source: Vchitect/LongVie (diffsynth/models/wan_video_dit_dual_control.py, pipelines/wan_video_new_longvie.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attention import sdpa
from ..clip_image.extension import ClipCond, ClipImage, ClipImageExtension
from ..fun_control.extension import part_of
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.config import WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.latents import add_noise
from ..wanvideo.modifier import Modifier, Start
from ..wanvideo.modules.attention import WanI2VCrossAttention
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.schedulers import Schedule
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Text, Tokens, video_tokens

MERGED = re.compile(r"^blocks\.\d+\.control_(blocks_(dense|sparse)|combine_linears)\.")
# Names of the authors' own file: lists of their own, and what is beside them.
LISTS = re.compile(r"^(control_(?:blocks_dense|blocks_sparse|combine_linears))\.(\d+)\.")
BESIDE = re.compile(r"^control_(initial_combine_linear_(dense|sparse)|text_linear|t_mod)\.")
CONTROLS = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True)
class DualControl(Payload):
    """What WanVideoAddDualControlEmbeds emits.

    dense, sparse [1, 2 z + 4, F, h, w]: an encoded control video, the mask and the encoding of its first frame alone;
    None where it is not connected. history [1, z, P, h, w]: an encoded earlier clip. strength 0-d; start, end: the part
    of the steps (0..1) in which the videos control.
    """

    strength: Tensor
    dense: Tensor | None = None
    sparse: Tensor | None = None
    history: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "Dual control embeds need a model with blocks.0.control_blocks_dense: connect the LongVie 2 file by "
        "WanVideoExtraModelSelect to 'extra_model' of WanVideoModelLoader, or load a checkpoint that has it merged in."
    )

    def window(self, window: Window) -> Self:
        """The frames of the window; history is what comes before the video, so that no later window has any."""
        parts = {
            name: part_of(window, video, f"{name} control video")
            for name in CONTROLS
            if (video := getattr(self, name)) is not None
        }
        begins = 0 in window.video
        return replace(self, history=self.history if begins else None, **parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class Continuation(Modifier):
    """The first frame begins as the last one of the history with a share of noise.

    history [1, z, P, height, width]: latents of an earlier clip; noise_level: 1 is noise alone.
    """

    replaces_start: ClassVar[bool] = True
    history: Tensor
    noise_level: float

    def begin(self, start: Start, schedule: Schedule, generator: torch.Generator) -> Start:
        """Raises ValueError where the history is of another size."""
        if schedule.first_index:
            return start
        first = start.latents[:, :1]
        last = self.history[0, :, -1:].to(first)
        if last.shape != first.shape:
            raise ValueError(
                f"prev_images have latents {tuple(last.shape)} a frame but the video has {tuple(first.shape)}: give "
                "frames of the video's width and height."
            )
        noisy = add_noise(last, start.noise[:, :1], self.noise_level)
        return start._replace(latents=torch.cat((noisy, start.latents[:, 1:]), dim=1))


class Controls(NamedTuple):
    """What the control blocks of one forward read besides their tokens: half as wide as what the main blocks read."""

    mod: Tensor
    rope: Tensor
    text: Tensor
    clip: Tensor | None
    shard: Shard = WHOLE


@dataclass
class Controlling:
    """Tokens [B, L, C / 2] of each control video on their way through the blocks."""

    tokens: dict[str, Tensor]
    read: Controls
    strength: Tensor


@dataclass(frozen=True)
class LongVie2(Extension):
    """layers: how many blocks have control blocks; dim, ffn_dim: of these; model_dim: of the model they are for."""

    layers: int
    dim: int
    ffn_dim: int
    model_dim: int
    payload: ClassVar[type] = DualControl
    file: ClassVar[Kind] = Kind(
        "LongVie 2 module", "WanVideo Extra Model Select", (r"^blocks\.0\.control_blocks_dense\.self_attn\.q\.weight$",)
    )

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the first block has a control block."""
        first = "blocks.0.control_blocks_dense"
        if f"{first}.modulation" not in shapes:
            return None
        layers = sum(re.fullmatch(r"blocks\.\d+\.control_combine_linears\.bias", key) is not None for key in shapes)
        bias = "blocks.0.control_combine_linears.bias"
        return cls(layers, shapes[f"{first}.modulation"][2], shapes[f"{first}.ffn.0.bias"][0], shapes[bias][0])

    @classmethod
    def published(cls, key: str) -> str:
        """Of the authors' file, which has the control blocks in lists of their own."""
        if BESIDE.match(key):
            return f"dual_controller.{key}"
        return LISTS.sub(r"blocks.\2.\1.", key)

    def owns(self, key: str) -> bool:
        """The control blocks, and what makes their inputs."""
        return key.startswith("dual_controller.") or MERGED.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Control blocks in the first blocks, and dual_controller. Raises ValueError for a model of another size."""
        config = model.config
        if config.dim != self.model_dim or self.layers > config.num_layers:
            raise ValueError(
                f"This LongVie 2 file is for a model of width {self.model_dim} but the model's is {config.dim}: load "
                "the image-to-video model of 14B."
            )
        half = replace(config, dim=self.dim, ffn_dim=self.ffn_dim, num_heads=self.dim // config.head_dim)
        for block in model.blocks[: self.layers]:
            block.control_blocks_dense, block.control_blocks_sparse = _control_block(half), _control_block(half)
            block.control_combine_linears = nn.Linear(self.dim, config.dim)
        owner = model.dual_controller = nn.Module()
        for name in ("initial_combine_linear_dense", "initial_combine_linear_sparse", "text_linear", "t_mod"):
            owner.add_module(f"control_{name}", nn.Linear(config.dim, self.dim))

    def prepare(
        self, model: WanModel, payload: DualControl, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Controlling | None]:
        """History as tokens, in every step; control tokens in theirs. Raises ValueError for videos of other sizes."""
        videos = {name: video for name in CONTROLS if (video := getattr(payload, name)) is not None}
        state = None
        if videos and inputs.step.within(payload.start, payload.end):
            state = self._controlling(model, payload, videos, inputs, tokens)
        return (tokens if payload.history is None else _with_history(model, payload.history, inputs, tokens)), state

    def _controlling(
        self, model: WanModel, payload: DualControl, videos: Mapping[str, Tensor], inputs: ModelInputs, tokens: Tokens
    ) -> Controlling:
        owner, x = model.dual_controller, tokens.x
        first = {}
        for name, video in videos.items():
            _check(name, video, tokens.latents)
            into = owner.get_submodule(f"control_initial_combine_linear_{name}")
            first[name] = into(_patches(model, video, x)).expand(x.shape[0], -1, -1)
        weight = owner.control_t_mod.weight
        clip = next((p for p in inputs.payloads if isinstance(p, ClipImage)), None)
        if clip is not None:
            features = model.img_emb(clip.positive).to(x.dtype).expand(x.shape[0], -1, -1).contiguous()
            clip = owner.control_text_linear(features)
        read = Controls(
            owner.control_t_mod(tokens.mod.to(weight.dtype)).float(),
            model.rope(tokens.grid, device=x.device),
            owner.control_text_linear(model.embed_text(inputs.text, x.dtype)),
            clip,
        )
        return Controlling(first, read, payload.strength)

    def on(self, state: Controlling, shard: Shard) -> Controlling:
        """The control tokens are those of the video."""
        length = state.read.rope.shape[0]
        read = state.read._replace(rope=shard.take(state.read.rope, dim=0), shard=shard.first(length))
        return replace(state, tokens={name: shard.take(x) for name, x in state.tokens.items()}, read=read)

    def beside_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Controlling) -> Tensor:
        """Runs the control blocks of this block and adds what they made to the video tokens."""
        if index >= self.layers:
            return x
        block, read, count = model.blocks[index], state.read, video_tokens(inputs.grid)
        rows = None if inputs.rows is None else inputs.rows[:count]
        own = inputs._replace(
            mod=read.mod, rows=rows, rope=read.rope, text=Text(read.text), attention=None, conds=(), shard=read.shard
        )
        clip = None if read.clip is None else ClipCond(read.clip)
        for name, tokens in state.tokens.items():
            state.tokens[name] = block.get_submodule(f"control_blocks_{name}")(tokens, own, (clip,))
        control = block.control_combine_linears(sum(state.tokens.values())) * state.strength.to(x)
        if count == x.shape[1]:
            return x + control
        return torch.cat((x[:, :count] + control, x[:, count:]), dim=1)


def _control_block(config: WanConfig) -> WanAttentionBlock:
    """Reads pictures as an image-to-video model does, if one is connected."""
    block = WanAttentionBlock(config, sdpa())
    block.cross_attn = WanI2VCrossAttention(config, sdpa())
    block.extensions = (ClipImageExtension(clip_dim=0),)
    return block


def _check(name: str, video: Tensor, latents: Tensor) -> None:
    if video.shape[2:] != latents.shape[2:] or video.shape[1] > latents.shape[1]:
        raise ValueError(
            f"The {name} control video has latents {tuple(video.shape[1:])} but the model reads "
            f"{tuple(latents.shape[1:])} (channels, frames, height, width): give pictures of the video's size and "
            "length, and load an image-to-video model."
        )


def _patches(model: WanModel, latents: Tensor, like: Tensor) -> Tensor:
    """Tokens [1, L, C] of latents [1, c, F, h, w], dense and in the dtype of `like`; channels beyond c are empty."""
    room = model.config.in_dim - latents.shape[1]
    whole = functional.pad(latents, (0, 0, 0, 0, 0, 0, 0, room)).to(model.patch_embedding.weight.dtype)
    return model.patch_embedding(whole).flatten(2).transpose(1, 2).to(like.dtype).contiguous()


def _with_history(model: WanModel, history: Tensor, inputs: ModelInputs, tokens: Tokens) -> Tokens:
    """History comes before the video: its tokens come last, but its frames first, and the video's later."""
    count, (frames, height, width) = history.shape[2], tokens.grid
    sides, wanted = tuple(history.shape[3:]), tuple(tokens.latents.shape[3:])
    if sides != wanted:
        raise ValueError(
            f"prev_images have latents of {sides} but the video of {wanted} (height, width): give frames of the "
            "video's width and height."
        )
    # The condition channels of history say that it is given; unlike a picture's they come in front.
    room = model.config.in_dim - history.shape[1]
    given = torch.cat((history.new_ones(1, room, *history.shape[2:]), history), dim=1)
    x = _patches(model, given, tokens.x).expand(tokens.x.shape[0], -1, -1)
    rope = model.rope((count + frames, height, width), riflex_index=inputs.riflex_index, device=tokens.x.device)
    before, video = rope.split((count * height * width, frames * height * width))
    moved = tokens._replace(rope=torch.cat((video, tokens.rope[video_tokens(tokens.grid) :])))
    return moved.appended(x, before, tokens.last_frame_mod)


EXTENSION = LongVie2
