"""Wan2.2-Animate as an extension of the Wan transformer: a character that moves like the person of a video.

The reference picture is the first latent frame. Latents of drawn poses are added to the patches of the others, and
behind every fifth block they attend to tokens of the driving face.

Source: Wan-Video/Wan2.2 (wan/modules/animate/model_animate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..wanvideo.assign import layer_count
from ..wanvideo.conditioning import Payload, Window, frames_at
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens, video_tokens
from .face import FaceBlock, FaceEncoder
from .motion_encoder import MotionEncoder

POSES, MOTION, FACES, ADAPTER = "pose_patch_embedding", "motion_encoder", "face_encoder", "face_adapter"
FUSERS = f"{ADAPTER}.fuser_blocks"
LAYERS = f"{MOTION}.enc.net_app.convs."
# The adapter has a block behind every fifth block of the transformer, from the first on.
EVERY = 5
NEEDS = f"Animate embeds need a model with {POSES}.weight: load a Wan2.2-Animate checkpoint in WanVideoModelLoader."
# A black face, which passes without the prompt see.
BLACK = -1.0


@dataclass(frozen=True, kw_only=True)
class Character(Payload):
    """What WanVideoAnimateEmbeds emits, and its loop for each window.

    cond [1, 4 + z, F, h, w]: mask (1 where a frame is given) and latents of the reference picture in the first frame,
    then of the background. pose [1, z, F - 1, h, w]: latents of drawn poses, from the second frame on, or None. faces
    [1, 3, 4 (F - 2) + 1, S, S] in -1..1: the driving face, one picture a video frame, or None. pose_strength,
    face_strength: 0-d.
    """

    cond: Tensor
    pose: Tensor | None
    faces: Tensor | None
    pose_strength: Tensor
    face_strength: Tensor
    needs: ClassVar[str] = NEEDS
    encoded: ClassVar[bool] = True
    fills_channels: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """Its frames behind the reference."""
        if window.whole:
            return self
        pose, faces = self.pose, self.faces
        if pose is not None:
            pose = frames_at([place - 1 for place in window.latents[1:]], pose, "The latents of Animate's pose_images")
        if faces is not None:
            faces = frames_at(window.pixels, faces, "Animate's face_images")
        cond = frames_at(window.latents, self.cond, "The latents of Animate's pictures")
        return replace(self, cond=cond, pose=pose, faces=faces)

    def without(self, names: frozenset[str]) -> Self:
        """Passes without the prompt see a black face, as the authors guide expressions."""
        if "text" not in names or self.faces is None:
            return self
        return replace(self, faces=torch.full_like(self.faces, BLACK))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Everything stays in float32 until the first layer reads it."""
        return super().to(device, torch.float32)


class Face(NamedTuple):
    """Face tokens [B * F, N, C] and their strength, 0-d."""

    tokens: Tensor
    strength: Tensor


@dataclass(frozen=True)
class Animate(Extension):
    """Sizes. channels: of the motion encoder's layers; style_dim, motion_dim: of its vector and its basis; hidden_dim,
    tokens: of the face encoder; blocks: of the adapter; pose_dim: channels of pose latents."""

    channels: tuple[int, ...]
    style_dim: int
    motion_dim: int
    hidden_dim: int
    tokens: int
    blocks: int
    pose_dim: int
    payload: ClassVar[type] = Character
    # As the original pack, which quantizes none of it.
    high_precision: ClassVar[tuple[str, ...]] = ("fuser_blocks",)

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the patch embedding of poses and the motion encoder."""
        first, last = shapes.get(f"{LAYERS}0.0.weight"), shapes.get(f"{MOTION}.enc.fc.4.weight")
        if first is None or last is None or f"{POSES}.weight" not in shapes:
            return None
        blocks = range(1, layer_count(shapes, LAYERS) - 1)
        hidden = shapes[f"{FACES}.conv2.conv.weight"][0]
        return cls(
            channels=(first[0], *(shapes[f"{LAYERS}{block}.skip.1.weight"][0] for block in blocks)),
            style_dim=last[1],
            motion_dim=last[0],
            hidden_dim=hidden,
            tokens=shapes[f"{FACES}.conv1_local.conv.weight"][0] // hidden,
            blocks=layer_count(shapes, f"{FUSERS}."),
            pose_dim=shapes[f"{POSES}.weight"][1],
        )

    def owns(self, key: str) -> bool:
        """Poses, motion encoder, face encoder and adapter."""
        return key.startswith(tuple(f"{part}." for part in (POSES, MOTION, FACES, ADAPTER)))

    def build(self, model: WanModel) -> None:
        """Adds the modules of `owns`."""
        config = model.config
        size = config.patch_size
        model.pose_patch_embedding = nn.Conv3d(self.pose_dim, config.dim, kernel_size=size, stride=size)
        model.motion_encoder = MotionEncoder(self.channels, self.style_dim, self.motion_dim)
        model.face_encoder = FaceEncoder(self.style_dim, self.hidden_dim, self.tokens, config.dim)
        model.face_adapter = nn.Module()
        model.face_adapter.fuser_blocks = nn.ModuleList(FaceBlock(config) for _ in range(self.blocks))

    def stacks(self, model: WanModel) -> Mapping[str, nn.ModuleList]:
        """The adapter's blocks."""
        return {FUSERS: model.face_adapter.fuser_blocks}

    def latents(self, model: WanModel, payload: Character, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joins mask, reference and background behind the noise. Raises ValueError where they do not fit."""
        cond, room = payload.cond, model.config.in_dim - latents.shape[1]
        if cond.shape[1] != room or cond.shape[2:] != latents.shape[2:]:
            raise ValueError(
                f"The Animate embeds are {tuple(cond.shape[1:])} (channels, frames, height, width) but the model has "
                f"room for {(room, *latents.shape[2:])}: disconnect other pictures, and encode at the video's size."
            )
        return torch.cat((latents, cond.to(latents).expand(latents.shape[0], -1, -1, -1, -1)), dim=1)

    def prepare(
        self, model: WanModel, payload: Character, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Face | None]:
        """Poses on all frames but the reference; idle from here on where there is no face."""
        if payload.pose is not None:
            tokens = _with_poses(model, payload, tokens)
        if payload.faces is None:
            return tokens, None
        side = model.motion_encoder.size
        if tuple(payload.faces.shape[3:]) != (side, side):
            raise ValueError(f"The model reads faces of {side}x{side} but got {tuple(payload.faces.shape[3:])}.")
        batch, frames = payload.faces.shape[0], payload.faces.transpose(1, 2).flatten(0, 1)
        motion = model.motion_encoder(frames).unflatten(0, (batch, -1))
        faces = model.face_encoder(motion.to(model.face_encoder.out_proj.weight.dtype)).to(tokens.x.dtype)
        # The reference frame has no face.
        faces = torch.cat((torch.zeros_like(faces[:, :1]), faces), dim=1)
        if faces.shape[1] != tokens.grid[0]:
            raise ValueError(
                f"The faces cover {faces.shape[1] - 1} latent frames but the video has {tokens.grid[0] - 1} behind the "
                "reference: give as many face_images as the video has frames."
            )
        faces = faces.expand(tokens.x.shape[0], -1, -1, -1).flatten(0, 1)
        return tokens, Face(faces, payload.face_strength)

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Face) -> Tensor:
        """Adds what the video tokens see of the face, behind every fifth block."""
        place, rest = divmod(index, EVERY)
        if rest or place >= self.blocks:
            return x
        count, block = video_tokens(inputs.grid), model.face_adapter.fuser_blocks[place]
        video, others = x[:, :count], x[:, count:]
        with model.visit(block):
            face = block(video.reshape(len(state.tokens), -1, x.shape[-1]), state.tokens)
        video = video + face.reshape(video.shape) * state.strength.to(x.dtype)
        return torch.cat((video, others), dim=1) if others.shape[1] else video


def _with_poses(model: WanModel, payload: Character, tokens: Tokens) -> Tokens:
    embedding, (frames, *size) = model.pose_patch_embedding, tokens.grid
    patches = embedding(payload.pose.to(embedding.weight.dtype))
    if list(patches.shape[2:]) != [frames - 1, *size]:
        raise ValueError(
            f"The poses give {tuple(patches.shape[2:])} tokens (frames, height, width) but the video behind its "
            f"reference has {(frames - 1, *size)}: encode them at its size and length."
        )
    first, count = size[0] * size[1], video_tokens(tokens.grid)
    poses = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype) * payload.pose_strength.to(tokens.x.dtype)
    x = tokens.x
    return tokens._replace(x=torch.cat((x[:, :first], x[:, first:count] + poses, x[:, count:]), dim=1))


EXTENSION = Animate
