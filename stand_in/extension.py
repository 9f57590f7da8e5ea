"""Stand-In (Xue et al. 2025): the latents of a face as reference tokens, which all video tokens attend to.

The reference is clean (time 0), attends to itself alone, and never reads the text. A LoRA changes queries, keys and
values of its tokens and of no others. Source: WeChatCV/Stand-In (wan_video_dit).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionCall
from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import ModelInputs, Projections, Tokens

PAIRS = ("q_loras", "k_loras", "v_loras")
OWN_KEYS = re.compile(r"blocks\.\d+\.self_attn\.[qkv]_loras\.")
MARK = "blocks.0.self_attn.q_loras.down.weight"


@dataclass(frozen=True)
class FaceReference(Payload):
    """latents [1, C, F, h, w] float32: the encoded picture. offset: additional distance from the video in positions."""

    latents: Tensor
    offset: int = 1
    needs: ClassVar[str] = (
        f"Stand-In needs a model with {MARK}: connect its LoRA (WanVideoLoraSelect) to the 'lora' input of "
        "WanVideoModelLoader."
    )
    encoded: ClassVar[bool] = True

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


class LoraPair(nn.Module):
    """A linear layer of low rank."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.up(self.down(x.to(self.down.weight.dtype)))


class Face(NamedTuple):
    """Which tokens are the reference (start to stop), strength of the LoRA (0-d); stream [B, stop - start, C]: the
    reference behind self-attention, once it is known. whole: the first two in the whole sequence."""

    start: int
    stop: int
    strength: Tensor
    stream: Tensor | None = None
    whole: tuple[int, int] | None = None

    def replaced(self, x: Tensor, part: Tensor) -> Tensor:
        """x [B, L, ...] with `part` as the reference's tokens."""
        return torch.cat((x[:, : self.start], part.to(x.dtype), x[:, self.stop :]), dim=1)


@dataclass(frozen=True)
class StandIn(Extension):
    """rank of the LoRA, and its strength."""

    rank: int
    strength: float = 1.0
    payload: ClassVar[type] = FaceReference
    file: ClassVar[Kind] = Kind(
        "Stand-In LoRA", "WanVideo Lora Select", (r"self_attn\.q_loras\.down\.weight$",), whole=True
    )
    high_precision: ClassVar[tuple[str, ...]] = PAIRS
    lora_layers: ClassVar[tuple[str, ...]] = tuple(f"blocks.*.self_attn.{pair}" for pair in PAIRS)

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the LoRA is loaded with the model."""
        return cls(rank=shapes[MARK][0]) if MARK in shapes else None

    def at_strength(self, strength: float) -> Self:
        """As the node of the LoRA says."""
        return replace(self, strength=strength)

    def owns(self, key: str) -> bool:
        """The pairs in every block."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds q_loras, k_loras and v_loras to the self-attention of every block."""
        for block in model.blocks:
            for pair in PAIRS:
                setattr(block.self_attn, pair, LoraPair(model.config.dim, self.rank))

    def prepare(
        self, model: WanModel, payload: FaceReference, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Face]:
        """Appends the reference before the video in time, and behind it in height and width.

        Condition channels, if there are any, are empty. Raises ValueError for latents of another VAE than the model's.
        """
        channels, config = payload.latents.shape[1], model.config
        if channels != config.out_dim:
            raise ValueError(
                f"The ip_image_latent has {channels} channels but the video of this model {config.out_dim}: encode the "
                "picture with the model's own VAE."
            )
        embedding = model.patch_embedding
        latents = F.pad(payload.latents, (0, 0, 0, 0, 0, 0, 0, config.in_dim - channels))
        patches = embedding(latents.to(embedding.weight.dtype))
        frames, height, width = patches.shape[2:]
        rope = model.rope(
            (1, height, width),
            start=(-1 - payload.offset, *tokens.grid[1:]),
            riflex_index=inputs.riflex_index,
            riflex_frames=tokens.grid[0],
            device=tokens.x.device,
        )
        start, x = tokens.x.shape[1], patches.flatten(2).transpose(1, 2)
        face = Face(start, start + x.shape[1], torch.tensor(float(self.strength), device=x.device))
        return tokens.appended(x, rope.repeat(frames, 1, 1), model.clean_modulation()), face

    def on(self, state: Face, shard: Shard) -> Face:
        """The reference's tokens of this part; attention sees all of them."""
        start, stop = state[:2]
        return state._replace(start=shard.count(start), stop=shard.count(stop), whole=(start, stop))

    def projected(self, block: WanAttentionBlock, value: Projections, cond: Face) -> tuple[Projections, Face]:
        """Adds the LoRA to the reference's queries, keys and values."""
        face = value.x[:, cond.start : cond.stop].contiguous()
        changed = []
        for pair, y in zip(PAIRS, value[1:], strict=True):
            delta = getattr(block.self_attn, pair)(face) * cond.strength
            changed.append(cond.replaced(y, y[:, cond.start : cond.stop] + delta))
        return Projections(value.x, *changed), cond

    def attend(self, block: WanAttentionBlock, call: AttentionCall, cond: Face) -> tuple[AttentionCall, Face]:
        """The reference to itself; all others, as before, to the reference too."""
        count, (start, stop) = call.q.shape[1], cond.whole or cond[:2]
        others = []
        for (first, last), keys in call.spans or (((0, count), (0, count)),):
            parts = ((first, min(last, start)), (max(first, stop), last))
            others += [(part, keys) for part in parts if part[0] < part[1]]
        return call._replace(spans=tuple(sorted((*others, ((start, stop), (start, stop)))))), cond

    def before_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Face) -> tuple[Tensor, Face]:
        """Remembers the reference, which reads no text."""
        return x, cond._replace(stream=x[:, cond.start : cond.stop])

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Face) -> tuple[Tensor, Face]:
        """Puts it back."""
        return cond.replaced(x, cond.stream), cond


EXTENSION = StandIn
