"""SCAIL (Yan et al. 2025): a character moves as the rendered 3-D poses of a video do.

Its picture is a frame in front of the video. The poses, at half the video's size, are tokens of a patch embedding of
their own, beside the video: all blocks attend to both. Source: zai-org/SCAIL (dit_video_crossattn_sc_xc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fun_control.extension import part_of
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

MARK = "patch_embedding_pose.weight"
# The column at which the poses begin, out of the reach of the video's.
POSE_COLUMN = 120
WHOLE_RUN = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class PosedCharacter(Payload):
    """reference [1, C, 1, H, W]: the encoded picture; poses [1, C, F, h, w]: the encoded pose video, at half of H and W
    or at all of it.

    reference_strength [1] multiplies what the model reads of the picture, pose_strength the tokens of the poses.
    reference_steps, pose_steps: the part of the steps (0..1) in which each is there.
    """

    reference: Tensor | None = None
    reference_strength: Tensor | None = None
    reference_steps: tuple[float, float] = WHOLE_RUN
    poses: Tensor | None = None
    pose_strength: float = 1.0
    pose_steps: tuple[float, float] = WHOLE_RUN
    needs: ClassVar[str] = f"SCAIL needs a model with {MARK}: load its checkpoint in WanVideoModelLoader."
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The picture, and the poses of the window's frames."""
        return self if self.poses is None else replace(self, poses=part_of(window, self.poses, "SCAIL pose video"))

    def without(self, names: frozenset[str]) -> Self:
        """Passes without the prompt see an empty picture, and the same poses."""
        if "text" not in names or self.reference is None:
            return self
        return replace(self, reference_strength=torch.zeros_like(self.reference_strength))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embeddings read them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class Scail(Extension):
    """channels: what the patch embedding of the poses reads, and that of the video: latents and a mask."""

    channels: int
    payload: ClassVar[type] = PosedCharacter

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the patch embedding of the poses."""
        return cls(shapes[MARK][1]) if MARK in shapes else None

    def owns(self, key: str) -> bool:
        """The patch embedding of the poses."""
        return key.startswith("patch_embedding_pose.")

    def build(self, model: WanModel) -> None:
        """Adds it to the model."""
        patch = model.config.patch_size
        model.patch_embedding_pose = nn.Conv3d(self.channels, model.config.dim, kernel_size=patch, stride=patch)

    def latents(self, model: WanModel, payload: PosedCharacter, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joins the video's mask, which is empty: none of its frames is given."""
        return _with_channels(latents, latents.shape[1] + self.channels - model.config.out_dim)

    def prepare(
        self, model: WanModel, payload: PosedCharacter, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Appends the tokens of picture and poses. Raises ValueError where they have another size than the video."""
        first = 0
        if payload.reference is not None and inputs.step.within(*payload.reference_steps):
            tokens, first = self._with_reference(model, payload, inputs, tokens), 1
        if payload.poses is not None and inputs.step.within(*payload.pose_steps):
            tokens = self._with_poses(model, payload, inputs, tokens, first)
        return tokens, None

    def _with_reference(self, model: WanModel, payload: PosedCharacter, inputs: ModelInputs, tokens: Tokens) -> Tokens:
        """The picture comes first in time, at 0, and the video behind it; its tokens come last."""
        frames, height, width = tokens.grid
        reference = self._given(payload.reference, tokens)
        if reference.shape[3:] != tokens.latents.shape[3:]:
            advice = "resize the picture to the video's width and height"
            raise ValueError(_another_size("ref_image", reference, tokens.latents, advice))
        reference = reference * payload.reference_strength[:, None, None, None, None]
        x = _patches(model.patch_embedding, _with_channels(reference, model.config.in_dim), tokens)
        rope = model.rope(
            (frames + 1, height, width),
            riflex_index=inputs.riflex_index,
            riflex_frames=frames,
            device=tokens.x.device,
        )
        before, video = rope.split((height * width, frames * height * width))
        moved = tokens._replace(rope=torch.cat((video, tokens.rope[video_tokens(tokens.grid) :])))
        # Where frames differ in time, as with given first frames, picture and poses are as noisy as the last one.
        return moved.appended(x, before, tokens.last_frame_mod)

    def _with_poses(
        self, model: WanModel, payload: PosedCharacter, inputs: ModelInputs, tokens: Tokens, first: int
    ) -> Tokens:
        """Poses lie at the times of the video, which begins at `first`, and as far apart as the places they show.

        ComfyUI-WanVideoWrapper begins them at 0 beside a video from 1 on, so that the video runs ahead of its poses by
        a latent frame (its issue 1949); the authors' code does not.
        """
        poses = self._given(payload.poses, tokens)
        step = _places_a_token(poses, tokens.latents)
        x = _patches(model.patch_embedding_pose, poses, tokens) * payload.pose_strength
        frames, height, width = (
            side // patch for side, patch in zip(poses.shape[2:], model.config.patch_size, strict=True)
        )
        rope = model.rope(
            (frames, step * height, step * width),
            start=(first, 0, POSE_COLUMN),
            riflex_index=inputs.riflex_index,
            riflex_frames=tokens.grid[0],
            device=tokens.x.device,
        )
        # Cosines and sines are averaged, not angles, as the authors pool them: so turned, a vector loses some length.
        rope = rope.unflatten(0, (frames, height, step, width, step)).mean(dim=(2, 4)).flatten(0, 2)
        return tokens.appended(x, rope, tokens.last_frame_mod)

    def _given(self, latents: Tensor, tokens: Tokens) -> Tensor:
        """With a mask of ones, for a batch as large as the video's."""
        room = max(self.channels - latents.shape[1], 0)
        marked = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, room), value=1.0)
        return marked.expand(tokens.x.shape[0], -1, -1, -1, -1)


def _with_channels(latents: Tensor, channels: int) -> Tensor:
    """Latents [B, c, F, H, W] with empty channels behind them, where they have fewer."""
    room = max(channels - latents.shape[1], 0)
    return F.pad(latents, (0, 0, 0, 0, 0, 0, 0, room))


def _patches(embedding: nn.Conv3d, latents: Tensor, tokens: Tokens) -> Tensor:
    """Tokens [B, L, C] of latents, in the dtype of the video's."""
    patches = embedding(latents.to(embedding.weight.dtype))
    return patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)


def _places_a_token(poses: Tensor, video: Tensor) -> int:
    """How many places of the video a token of the poses stands for, in height and in width: 1 or 2."""
    if poses.shape[2:] == video.shape[2:]:
        return 1
    frames, *sides = video.shape[2:]
    if tuple(poses.shape[2:]) != (frames, *(side // 2 for side in sides)) or any(side % 4 for side in sides):
        advice = "render them at half of its width and height, which must divide by 32 then, and at its length"
        raise ValueError(_another_size("pose_images", poses, video, advice))
    return 2


def _another_size(name: str, latents: Tensor, video: Tensor, advice: str) -> str:
    return (
        f"The latents of SCAIL's {name} are {tuple(latents.shape[2:])} (frames, height, width) but the video's "
        f"{tuple(video.shape[2:])}: {advice}."
    )


EXTENSION = Scail
