"""CLIP image tokens in cross-attention: Wan 2.1 image to video, first-last-frame (FLF2V) and Fun models.

Source: Wan-Video/Wan2.1 (WanI2VCrossAttention, MLPProj).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.attention import WanI2VCrossAttention
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import Heads, ModelInputs, Tokens

PROJECTION = "img_emb.proj.1.weight"
POSITIONS = "img_emb.emb_pos"
# Of the model's own blocks: what other systems put into these may read pictures, too.
IMAGE_KEYS = re.compile(r"^blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\.")


@dataclass(frozen=True)
class ClipImage(Payload):
    """CLIP features of the pictures (socket WANVIDIMAGE_CLIPEMBEDS): [B, N, clip channels], 257 tokens an image.

    negative: what passes without the prompt read instead. added: of a second picture, whose projection is added.
    """

    positive: Tensor
    negative: Tensor | None = None
    added: Tensor | None = None
    needs: ClassVar[str] = "This model has no image cross-attention (img_emb), so clip_embeds have no effect."
    optional: ClassVar[bool] = True

    def without(self, names: frozenset[str]) -> Self:
        """The negative picture goes with the negative prompt."""
        return replace(self, positive=self.negative) if "text" in names and self.negative is not None else self


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
    """Image tokens at the transformer's width, [B, N, C]."""

    tokens: Tensor


@dataclass(frozen=True)
class ClipImageExtension(Extension):
    """clip_dim: width of the CLIP features; positions: rows of img_emb.emb_pos, 0 where the file has none."""

    clip_dim: int
    positions: int = 0
    payload: ClassVar[type] = ClipImage
    tokenwise: ClassVar[bool] = True

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the image projection."""
        if PROJECTION not in shapes:
            return None
        return cls(clip_dim=shapes[PROJECTION][1], positions=shapes.get(POSITIONS, (1, 0))[1])

    def owns(self, key: str) -> bool:
        """img_emb and the image keys and values of every block."""
        return key.startswith("img_emb.") or IMAGE_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds img_emb and turns every cross-attention into its image form."""
        model.img_emb = ImageProjection(self.clip_dim, model.config.dim, self.positions)
        for block in model.blocks:
            block.cross_attn = WanI2VCrossAttention(model.config, sdpa())

    def prepare(
        self, model: WanModel, payload: ClipImage, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, ClipCond]:
        """Projects the features; one row of them serves the whole batch."""
        image = model.img_emb(payload.positive)
        if payload.added is not None:
            image = image + model.img_emb(payload.added)
        image = image.to(tokens.x.dtype)
        return tokens, ClipCond(image.expand(tokens.x.shape[0], -1, -1).contiguous())

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: ClipCond) -> tuple[Heads, ClipCond]:
        """Adds attention to the image tokens."""
        image = block.cross_attn.attention(heads.q, *block.cross_attn.image_keys_values(cond.tokens))
        return heads._replace(out=heads.out + image), cond


EXTENSION = ClipImageExtension
