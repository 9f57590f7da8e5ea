"""MTVCrafter (Ding et al. 2025): in every fourth block, video tokens attend to tokens of a body's motion.

Source: DINGYANB/MTVCrafter (mvdit_transformer_17b). The published module is of a 14B model.
Shapes: B batch, L video tokens, N motion tokens (24 joints of every latent frame), C channels, H heads, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.rope import apply_rope
from ..quantized.linear import shared_input
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.config import ROPE_THETA, WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import at_step
from ..wanvideo.modules.attention import WanSelfAttention
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import WanLayerNorm, normalize
from ..wanvideo.modules.model import WanModel
from ..wanvideo.rope import axis_sizes
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens
from .joints import JOINTS, mean

OWN_KEYS = re.compile(r"blocks\.(\d+)\.(motion_attn|norm4)\.")
LAYER = re.compile(r"^blocks\.(\d+)\.motion_attn\.k\.weight$")


@dataclass(frozen=True)
class Motion(Payload):
    """tokens [1, f * 24, C]: codes of the joints in every latent frame.

    strengths: one a step, the last one holds on. start, end: the part of the steps (0..1) in which the motion acts.
    """

    tokens: Tensor
    strengths: tuple[float, ...] = (1.0,)
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "MTVCrafter's motion needs a model with blocks.0.motion_attn.k.weight: connect WanVideoExtraModelSelect to the "
        "'extra_model' input of WanVideoModelLoader, or load a checkpoint that has MTVCrafter merged in."
    )

    def window(self, window: Window) -> Self | None:
        """The joints of the window's latent frames; references have none.

        Raises ValueError where the motion ends before the window does.
        """
        frames = self.tokens.unflatten(1, (-1, JOINTS))
        places = window.video_in(frames.shape[1])
        if not places:
            return None
        if max(places) >= frames.shape[1]:
            raise ValueError(
                f"The poses of MTVCrafter cover {frames.shape[1]} latent frames (4 frames each) but the video needs "
                f"{max(places) + 1}: load as many frames of the pose video as the new one has."
            )
        return replace(self, tokens=frames[:, places].flatten(1, 2))


class MotionAttention(WanSelfAttention):
    """Attention of video tokens to motion tokens, both at their positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config, sdpa())

    def readers(self) -> tuple[nn.Module, ...]:
        """Only the queries are of the video tokens."""
        return (self.q,)

    def attend(self, x: Tensor | Fp8Rows, motion: Tensor, rope: Tensor, motion_rope: Tensor) -> Tensor:
        """x [B, L, C] normalized, motion [B, N, C]; rope [L, D/2, 2], motion_rope [N, D/2, 2] -> [B, L, C]."""
        q = self.norm_q.placed(self.q(x), rope, self.heads)
        shared = shared_input(motion, self.k, self.v)
        # The model was trained with keys whose memory is read as [B, H, N, D], which mixes tokens and heads.
        k = self.norm_k(self.k(shared)).contiguous()
        k = k.view(k.shape[0], self.heads[0], -1, self.heads[1]).transpose(1, 2).contiguous()
        return self.project(self.attention(q, apply_rope(k, motion_rope), self.split(self.v(shared))))


def motion_rope(frames: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotations [frames * 24, D/2, 2] of motion tokens: by frame, and by the mean place of their joint in mm."""
    axis = 2 * (2 * axis_sizes(head_dim)[1] // 6)
    places = mean() - mean().mean(dim=0)
    times = torch.arange(frames, dtype=torch.float64)
    angles = [_angles(times, head_dim - 3 * axis)[:, None].expand(-1, JOINTS, -1)]
    angles += [_angles(place.double(), axis).expand(frames, -1, -1) for place in places.unbind(1)]
    together = torch.cat(angles, dim=-1).flatten(0, 1)
    return torch.stack((together.cos(), together.sin()), dim=-1).float().to(device)


def _angles(positions: Tensor, size: int) -> Tensor:
    frequencies = ROPE_THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.outer(positions, frequencies)


class Moving(NamedTuple):
    """Motion tokens [B, N, C], rotations of video and motion, strength (0-d), number of video tokens."""

    motion: Tensor
    rope: Tensor
    motion_rope: Tensor
    strength: Tensor
    count: int


@dataclass(frozen=True)
class MtvCrafter(Extension):
    """blocks: the ones that have motion attention."""

    blocks: tuple[int, ...]
    payload: ClassVar[type] = Motion
    file: ClassVar[Kind] = Kind("MTVCrafter module", "WanVideo Extra Model Select", (LAYER.pattern,))

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has motion attention."""
        blocks = sorted(int(match[1]) for key in shapes if (match := LAYER.match(key)))
        return cls(tuple(blocks)) if blocks else None

    def owns(self, key: str) -> bool:
        """Motion attention and its norm."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds norm4 and motion_attn to its blocks."""
        for index in self.blocks:
            block = model.blocks[index]
            block.norm4 = WanLayerNorm(model.config.dim, model.config.eps, elementwise_affine=True)
            block.motion_attn = MotionAttention(model.config)

    def prepare(
        self, model: WanModel, payload: Motion, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Moving | None]:
        """Motion tokens padded with zeros to the model's width; idle outside its steps.

        Raises ValueError for tokens that are wider than the model.
        """
        strength = at_step(payload.strengths, inputs.step)
        if strength == 0 or not inputs.step.within(payload.start, payload.end):
            return tokens, None
        batch, device, config = tokens.x.shape[0], tokens.x.device, model.config
        count, width = payload.tokens.shape[1:]
        if width > config.dim:
            raise ValueError(
                f"The motion tokens have {width} channels but the model {config.dim}: MTVCrafter's module is for the "
                "14B models."
            )
        motion = F.pad(payload.tokens, (0, config.dim - width)).to(tokens.x.dtype)
        return tokens, Moving(
            motion=motion.expand(batch, -1, -1).contiguous(),
            rope=model.rope(tokens.grid, device=device),
            motion_rope=motion_rope(count // JOINTS, config.head_dim, device),
            strength=torch.tensor(float(strength), device=device),
            count=video_tokens(tokens.grid),
        )

    def on(self, state: Moving, shard: Shard) -> Moving:
        """Video tokens of this part turn by their own rotations; the motion is the same for all."""
        return state._replace(rope=shard.take(state.rope, dim=0), count=shard.count(state.count))

    def block_cond(self, state: Moving, index: int) -> Moving | None:
        """The same in every block that has motion attention."""
        return state if index in self.blocks else None

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Moving) -> tuple[Tensor, Moving]:
        """Adds motion attention to the video tokens of the residual stream."""
        attention, video = block.motion_attn, x[:, : cond.count].contiguous()
        moved = attention.attend(
            normalize(block.norm4, video, attention.readers()), cond.motion, cond.rope, cond.motion_rope
        )
        video = video + moved * cond.strength.to(x.dtype)
        return video if x.shape[1] == cond.count else torch.cat((video, x[:, cond.count :]), dim=1), cond


EXTENSION = MtvCrafter
