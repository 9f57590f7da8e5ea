"""SteadyDancer (Zhang et al. 2025): a picture dances to a video of drawn poses.

The patch embedding reads the poses, and their alignment with the noise, beside noise and picture; the picture and the
first pose stand behind the video as frames. Source: MCG-NJU/SteadyDancer (wan/modules/model_dancer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload, Row, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens
from .conditions import CHANNELS, Alignment, DynamicConv, FactorConv3d

MARK = "patch_embedding_fuse.weight"
OWN = ("patch_embedding_fuse.", "patch_embedding_ref_c.", "condition_embedding_")


@dataclass(frozen=True)
class DancePoses(Payload):
    """positive [1, 16, F, H, W]: encoded poses; negative: those of passes without the prompt.

    spatial, temporal: strengths of their structure and of their motion. start, end: the part of the steps (0..1) in
    which they act.
    """

    positive: Tensor
    negative: Tensor | None = None
    spatial: float = 1.0
    temporal: float = 1.0
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = f"SteadyDancer needs a model with {MARK}: load its checkpoint in WanVideoModelLoader."
    encoded: ClassVar[bool] = True

    def window(self, window: Window) -> Self | None:
        """The poses of the window's frames."""
        places = window.video_in(self.positive.shape[2])
        if not places:
            return None
        if max(places) >= self.positive.shape[2]:
            raise ValueError(
                f"SteadyDancer's poses cover {self.positive.shape[2]} latent frames (4 frames each) but the video "
                f"needs {max(places) + 1}: load as many frames of the pose video as the new one has."
            )
        negative = None if self.negative is None else self.negative[:, :, places]
        return replace(self, positive=self.positive[:, :, places], negative=negative)

    def without(self, names: frozenset[str]) -> Self:
        """The negative poses go with the negative prompt."""
        return replace(self, positive=self.negative) if "text" in names and self.negative is not None else self

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """That of the text. Raises ValueError where it has a negative pass, which needs poses of its own."""
        if scale != 1.0 and self.negative is None and step.within(self.start, self.end):
            raise ValueError(
                "cfg is not 1 but SteadyDancer has no poses for the negative pass: connect pose_latents_negative (an "
                "encoded empty video), or set cfg to 1."
            )
        return None

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the model's layers read them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class SteadyDancer(Extension):
    """Three encoders of poses and two patch embeddings beside the transformer."""

    payload: ClassVar[type] = DancePoses

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the patch embedding that reads poses."""
        return cls() if MARK in shapes else None

    def owns(self, key: str) -> bool:
        """The encoders and both patch embeddings."""
        return key.startswith(OWN)

    def build(self, model: WanModel) -> None:
        """Adds them to the model."""
        config = model.config
        patch = {"kernel_size": config.patch_size, "stride": config.patch_size}
        model.patch_embedding_fuse = nn.Conv3d(config.in_dim + 2 * CHANNELS, config.dim, **patch)
        model.patch_embedding_ref_c = nn.Conv3d(CHANNELS, config.dim, **patch)
        model.condition_embedding_spatial = DynamicConv()
        layers = [layer for _ in range(3) for layer in (FactorConv3d(), nn.SiLU())]
        model.condition_embedding_temporal = nn.Sequential(*layers)
        model.condition_embedding_align = Alignment()

    def prepare(
        self, model: WanModel, payload: DancePoses, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Embeds the video anew, with the poses, and appends picture and first pose as frames that go on in time.

        Raises ValueError where the poses have another size than the video.
        """
        if not inputs.step.within(payload.start, payload.end):
            return tokens, None
        if payload.positive.shape[2:] != tokens.latents.shape[2:]:
            raise ValueError(
                f"SteadyDancer's poses have latents {tuple(payload.positive.shape[2:])} but the video "
                f"{tuple(tokens.latents.shape[2:])}: encode them at the same width, height and length, and use no "
                "reference frames beside them."
            )
        dtype = model.patch_embedding_fuse.weight.dtype
        poses, latents = payload.positive.to(dtype).expand(tokens.x.shape[0], -1, -1, -1, -1), tokens.latents.to(dtype)
        read = (part.to(dtype) for part in _read(model, payload, poses, inputs.latents))
        video = model.patch_embedding_fuse(torch.cat((latents, *read), dim=1))
        frames = torch.cat((model.patch_embedding(_picture(latents)), model.patch_embedding_ref_c(poses[:, :, :1])), 2)
        video, frames = (x.flatten(2).mT.contiguous().to(tokens.x.dtype) for x in (video, frames))
        grid, count = tokens.grid, video_tokens(tokens.grid)
        rope = model.rope(
            (2, *grid[1:]),
            start=(grid[0], 0, 0),
            riflex_index=inputs.riflex_index,
            riflex_frames=grid[0],
            device=tokens.x.device,
        )
        # Where frames differ in time, as with given first frames, the two are as noisy as the last one.
        tokens = tokens._replace(x=torch.cat((video, tokens.x[:, count:]), dim=1))
        return tokens.appended(frames, rope, tokens.last_frame_mod), None


def _read(model: WanModel, payload: DancePoses, poses: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The poses with their structure and motion, and what the noise takes of that: [B, 16, F, H, W] each."""
    # Patch embeddings are in float32 at any base precision, the encoders are not.
    poses = poses.to(next(model.condition_embedding_temporal.parameters()).dtype)
    motion = model.condition_embedding_temporal(poses)
    structure = _by_frame(model.condition_embedding_spatial, poses)
    fused = poses + motion * payload.temporal + structure * payload.spatial
    # The alignment takes all frames that it is given for one video.
    noise = noise[:, :CHANNELS].to(fused.dtype)
    rows = [
        model.condition_embedding_align(pose.movedim(1, 0), row.movedim(1, 0)).movedim(0, 1)
        for pose, row in zip(fused, noise, strict=True)
    ]
    return fused, torch.stack(rows)


def _by_frame(module: nn.Module, x: Tensor) -> Tensor:
    """[B, z, F, H, W] through a module of pictures [n, z, H, W]."""
    pictures = module(x.movedim(2, 1).flatten(0, 1))
    return pictures.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)


def _picture(latents: Tensor) -> Tensor:
    """The encoded picture of the first frame as a frame of its own, [B, in_dim, 1, H, W]: in the place of the noise,
    and behind a mask of ones."""
    picture, room = latents[:, -CHANNELS:, :1], latents.shape[1] - CHANNELS
    mask = picture.new_ones(picture.shape[0], max(room - CHANNELS, 0), *picture.shape[2:])
    return torch.cat((picture, mask, picture[:, :room]), dim=1)


EXTENSION = SteadyDancer
