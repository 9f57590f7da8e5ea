"""RealisDance-DiT: poses are added to the tokens, and a reference picture follows them in attention.

Source: damo-cv/RealisDance (src/models/rd_dit.py); RealisDance-DiT (Zhou et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..image_to_video.extension import AddedCondition
from ..wanvideo.conditioning import Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

POSES, REFERENCE = "add_conv_in.weight", "attn_conv_in.weight"
# Where the reference is in time; in height and width it follows the video.
REFERENCE_TIME = 81


@dataclass(frozen=True, kw_only=True)
class DancePoses(AddedCondition):
    """reference [1, C, 1, H, W]: the encoded picture; poses [1, 2 C, F, H, W]: encoded renders of body and hands.

    start, end: the part of the steps (0..1) in which poses are there; the reference always is.
    """

    reference: Tensor
    poses: Tensor
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "This model has no attn_conv_in.weight of RealisDance, so it cannot read its poses: load RealisDance-DiT, or "
        "disconnect add_cond_latents."
    )

    def window(self, window: Window) -> Self:
        """The poses of the window. Raises ValueError if there are fewer than latent frames, or for all of it more."""
        count, needed = self.poses.shape[2], window.total or max(window.latents) + 1
        if count != needed:
            raise ValueError(
                f"RealisDance's poses have {count} latent frames but the video has {needed}: render and encode as many "
                "frames as num_frames."
            )
        return replace(self, poses=self.poses[:, :, list(window.latents)])

    def without(self, names: frozenset[str]) -> Self:
        """Passes without the prompt see an empty picture in the place of the reference."""
        return replace(self, reference=self.empty) if "text" in names and self.empty is not None else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the convolutions read them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class RealisDance(Extension):
    """pose_dim, reference_dim: channels that the convolutions of poses and reference read."""

    pose_dim: int
    reference_dim: int
    payload: ClassVar[type] = DancePoses

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By both convolutions."""
        if not {POSES, REFERENCE} <= shapes.keys():
            return None
        return cls(shapes[POSES][1], shapes[REFERENCE][1])

    def owns(self, key: str) -> bool:
        """The convolutions and the projection."""
        return key.startswith(("add_conv_in.", "add_proj.", "attn_conv_in."))

    def build(self, model: WanModel) -> None:
        """Under their published names."""
        dim, patch = model.config.dim, model.config.patch_size
        model.add_conv_in = nn.Conv3d(self.pose_dim, dim, kernel_size=patch, stride=patch)
        model.add_proj = nn.Linear(dim, dim)
        model.attn_conv_in = nn.Conv3d(self.reference_dim, dim, kernel_size=patch, stride=patch)

    def prepare(self, model: WanModel, payload: DancePoses, inputs: ModelInputs, tokens: Tokens) -> tuple[Tokens, None]:
        """Poses on the video's tokens in their steps, and the reference behind them."""
        _, height, width = grid = tokens.grid
        if inputs.step.within(payload.start, payload.end):
            poses = _patches(model.add_conv_in, payload.poses, grid, "poses")
            count, added = video_tokens(grid), model.add_proj(poses)
            x = torch.cat((tokens.x[:, :count] + added.to(tokens.x.dtype), tokens.x[:, count:]), dim=1)
            tokens = tokens._replace(x=x)
        size = (payload.reference.shape[2], height, width)
        reference = _patches(model.attn_conv_in, payload.reference, size, "reference").to(tokens.x.dtype)
        rope = model.rope(size, start=(REFERENCE_TIME, height, width), device=tokens.x.device)
        return tokens.appended(reference.expand(tokens.x.shape[0], -1, -1), rope), None


def _patches(conv: nn.Conv3d, latents: Tensor, grid: tuple[int, int, int], what: str) -> Tensor:
    """Tokens [1, L, C] of latents. Raises ValueError where they do not make this grid."""
    patches = conv(latents.to(conv.weight.dtype)) if latents.shape[1] == conv.in_channels else None
    if patches is None or tuple(patches.shape[2:]) != tuple(grid):
        raise ValueError(
            f"RealisDance's {what} have latents {tuple(latents.shape[1:])} (channels, frames, height, width), which do "
            f"not fit {conv.in_channels} channels and the video's {tuple(grid)} patches: encode them with the VAE of "
            "the model at the video's width, height and length."
        )
    return patches.flatten(2).transpose(1, 2)


EXTENSION = RealisDance
