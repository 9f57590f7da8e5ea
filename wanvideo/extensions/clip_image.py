"""CLIP image tokens in cross-attention: Wan 2.1 image to video, first-last-frame (FLF2V) and Fun models.

Source: Wan-Video/Wan2.1 (WanI2VCrossAttention, MLPProj).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ...attention import sdpa
from ..extension import Extension, Heads, Step, Tokens
from ..modules.model import WanAttentionBlock, WanI2VCrossAttention, WanModel

PROJECTION = "img_emb.proj.1.weight"
POSITIONS = "img_emb.emb_pos"
IMAGE_KEYS = ("cross_attn.k_img.", "cross_attn.v_img.", "cross_attn.norm_k_img.")


@dataclass(frozen=True)
class ClipImage:
    """Payload: CLIP features [B, N, clip channels], 257 tokens an image."""

    tokens: Tensor
    needs: ClassVar[str] = (
        "CLIP image features need a model with img_emb.proj.1.weight: load an image-to-video checkpoint in "
        "WanVideoModelLoader's 'model' input, or disconnect clip_embeds."
    )

    def window(self, frames: Sequence[int]) -> Self:
        """The same image conditions every window."""
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move and cast the features."""
        return replace(self, tokens=self.tokens.to(device, dtype))

    def stack(self, others: Sequence[Self]) -> Self:
        """Join batch rows."""
        return replace(self, tokens=torch.cat([self.tokens, *(other.tokens for other in others)]))


class ImageProjection(nn.Module):
    """CLIP features to the transformer's width; with positions (FLF2V) several images are told apart."""

    def __init__(self, clip_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )
        if positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, clip_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, clip channels] -> [B, N, C]. FLF2V models take any number of images up to their positions."""
        if hasattr(self, "emb_pos"):
            if tokens.shape[1] > self.emb_pos.shape[1]:
                raise ValueError(
                    f"This first-last-frame model has positions for {self.emb_pos.shape[1]} CLIP tokens but got "
                    f"{tokens.shape[1]}: give at most two images to WanVideoClipVisionEncode with 'concat'."
                )
            tokens = tokens + self.emb_pos[:, : tokens.shape[1]].to(tokens)
        return self.proj(tokens.to(self.proj[1].weight.dtype))


class ClipCond(NamedTuple):
    """Keys and values of the image tokens, [B, N, H, D]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class ClipImageExtension(Extension):
    """clip_dim: width of the CLIP features; positions: rows of img_emb.emb_pos, 0 where the file has none."""

    clip_dim: int
    positions: int = 0
    payload: ClassVar[type] = ClipImage

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the image projection."""
        if PROJECTION not in shapes:
            return None
        return cls(clip_dim=shapes[PROJECTION][1], positions=shapes.get(POSITIONS, (1, 0))[1])

    def owns(self, key: str) -> bool:
        """img_emb and the image keys and values of every block."""
        return key.startswith("img_emb.") or any(part in key for part in IMAGE_KEYS)

    def build(self, model: WanModel) -> None:
        """Adds img_emb and turns every cross-attention into its image form."""
        model.img_emb = ImageProjection(self.clip_dim, model.config.dim, self.positions)
        for block in model.blocks:
            block.cross_attn = WanI2VCrossAttention(model.config, sdpa())

    def prepare(self, model: WanModel, payload: ClipImage, step: Step, tokens: Tokens) -> tuple[Tokens, Tensor]:
        """Image tokens [B, N, C]; one row serves the whole batch."""
        image = model.img_emb(payload.tokens).to(tokens.x.dtype)
        return tokens, image.expand(tokens.x.shape[0], -1, -1).contiguous()

    def once(self, block: WanAttentionBlock, state: Tensor, index: int) -> ClipCond:
        """Keys and values depend on the image alone."""
        return ClipCond(*block.cross_attn.image_keys_values(state))

    def block_cond(self, state: Tensor, index: int, kept: ClipCond) -> ClipCond:
        """What `once` kept."""
        return kept

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: ClipCond) -> tuple[Heads, ClipCond]:
        """Adds attention to the image tokens."""
        image = block.cross_attn.attention(heads.q, cond.k, cond.v)
        return heads._replace(out=heads.out + image), cond
