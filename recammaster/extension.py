"""ReCamMaster (Bai et al. 2025): a given video filmed anew along another path of the camera.

The source video's latents are frames behind the noise, which all blocks attend to; every block adds the embedded camera
of each frame to what self-attention reads, and projects what it gives. Source: KwaiVGI/ReCamMaster (wan_video_dit).

Shapes: B batch, L tokens, C channels, F latent frames of the video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload, Window, frames_at
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

# Rotation and translation of a pose, row by row.
POSE = 12
OWN_KEYS = re.compile(r"blocks\.\d+\.(cam_encoder|projector)\.")
MARK = "blocks.0.cam_encoder.weight"


@dataclass(frozen=True)
class CameraChange(Payload):
    """poses [1, F, 12]: the camera in every latent frame, relative to the first one. source [1, C, F, H, W]: the
    encoded video that is filmed anew."""

    poses: Tensor
    source: Tensor
    needs: ClassVar[str] = (
        f"ReCamMaster needs a model with {MARK}: load its checkpoint in WanVideoModelLoader, or connect its module "
        "(WanVideoExtraModelSelect) to 'extra_model'."
    )
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self | None:
        """The same frames of both videos."""
        places = list(window.video)
        if not places:
            return None
        source = frames_at(places, self.source, "The latents of ReCamMaster's source video")
        return replace(self, poses=self.poses[:, places], source=source)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents and poses stay in float32 until the model's layers read them."""
        return super().to(device, torch.float32)


class Camera(NamedTuple):
    """poses [B, F, 12]; frames [n]: the row of a pose of the first n tokens, the one past the end where they have none;
    moving [n, 1]: whether they have one, None where all do. What others append later is behind the n."""

    poses: Tensor
    frames: Tensor
    moving: Tensor | None


@dataclass(frozen=True)
class ReCamMaster(Extension):
    """A camera encoder and a projector in every block."""

    payload: ClassVar[type] = CameraChange
    file: ClassVar[Kind] = Kind(
        "ReCamMaster module", "WanVideo Extra Model Select", (r"^blocks\.0\.cam_encoder\.weight$",)
    )

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the blocks have camera encoders."""
        return cls() if MARK in shapes else None

    def owns(self, key: str) -> bool:
        """Both layers of every block."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds cam_encoder and projector to every block."""
        dim = model.config.dim
        for block in model.blocks:
            block.cam_encoder = nn.Linear(POSE, dim)
            block.projector = nn.Linear(dim, dim)

    def prepare(
        self, model: WanModel, payload: CameraChange, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Camera]:
        """Appends the source as frames that go on in time. Raises ValueError where sizes or lengths differ."""
        frames, *size = tokens.grid
        config, (_, channels, *source) = model.config, payload.source.shape
        if channels != config.out_dim or source != list(tokens.latents.shape[2:]):
            raise ValueError(
                f"ReCamMaster's source video has latents {(channels, *source)} but the new one "
                f"{(config.out_dim, *tokens.latents.shape[2:])}: encode it with the model's VAE at the same width, "
                "height and length, and use no reference frames beside it."
            )
        if payload.poses.shape[1] != frames:
            raise ValueError(
                f"The camera path has {payload.poses.shape[1]} poses but the video {frames} latent frames: make a path "
                f"of {4 * frames - 3} frames."
            )
        latents = F.pad(payload.source, (0, 0, 0, 0, 0, 0, 0, config.in_dim - channels))
        patches = model.patch_embedding(latents.to(model.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        rope = model.rope(
            tokens.grid,
            start=(frames, 0, 0),
            riflex_index=inputs.riflex_index,
            riflex_frames=frames,
            device=tokens.x.device,
        )
        batch, before, count = tokens.x.shape[0], tokens.x.shape[1], video_tokens(tokens.grid)
        # Where frames differ in time, as with given first frames, the source is as noisy as the last one.
        tokens = tokens.appended(patches.expand(batch, -1, -1), rope, tokens.last_frame_mod)
        own = torch.arange(frames, device=rope.device).repeat_interleave(size[0] * size[1])
        others = own.new_full((before - count,), frames)
        places = torch.cat((own, others, own))
        moving = None if before == count else (places < frames)[:, None]
        return tokens, Camera(payload.poses.expand(batch, -1, -1).contiguous(), places, moving)

    def on(self, state: Camera, shard: Shard) -> Camera:
        """The poses of this part's tokens."""
        moving = None if state.moving is None else shard.take(state.moving, dim=0)
        return state._replace(frames=shard.take(state.frames, dim=0), moving=moving)

    def self_attn_input(self, block: WanAttentionBlock, x: Tensor, cond: Camera) -> tuple[Tensor, Camera]:
        """Adds the camera of its frame to every token."""
        cameras = F.pad(block.cam_encoder(cond.poses.to(x.dtype)), (0, 0, 0, 1))[:, cond.frames]
        later = x.shape[1] - cameras.shape[1]
        return x + (F.pad(cameras, (0, 0, 0, later)) if later else cameras), cond

    def self_attn_output(self, block: WanAttentionBlock, y: Tensor, cond: Camera) -> tuple[Tensor, Camera]:
        """Tokens of other systems go without the projector."""
        projected, count = block.projector(y), cond.frames.shape[0]
        if cond.moving is not None:
            projected = torch.cat((torch.where(cond.moving, projected[:, :count], y[:, :count]), y[:, count:]), dim=1)
        elif y.shape[1] > count:
            projected = torch.cat((projected[:, :count], y[:, count:]), dim=1)
        return projected, cond


EXTENSION = ReCamMaster
