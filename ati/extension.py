"""ATI: what the start picture shows where a track starts is painted into later condition frames where the track is.

Source: bytedance/ATI (wan/modules/motion_patch.py); ATI (Wang et al. 2025). It has no weights: the image-to-video model
itself was trained to read such conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..image_to_video.extension import ImageCondition, ImageToVideo
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs


def painted(cond: Tensor, starts: Tensor, points: Tensor, *, temperature: float, topk: int) -> tuple[Tensor, Tensor]:
    """A condition with tracks in it: latents [B, C, F, H, W], and their mask [B, F, H, W].

    cond [B, C, F, H, W]: encoded start picture and empty frames. starts [B, N, 2], points [B, F, N, 3]: as in
    `latent_tracks`. Every place takes from its `topk` strongest tracks, whose strength falls off with
    exp(-temperature * distance ** 2).
    """
    height, width = cond.shape[3:]
    short = min(height, width)
    rows, columns = (torch.linspace(-n / short, n / short, n, device=cond.device) for n in (height, width))
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    later = points[:, 1:, None, None]
    distance = (later[..., :2] - places[:, :, None]).square().sum(-1)
    strength = torch.exp(-distance * temperature) * later[..., 2]
    strongest = strength.topk(min(topk, strength.shape[-1]), dim=-1)
    strength = torch.zeros_like(strength).scatter(-1, strongest.indices, strongest.values)
    # grid_sample's own scale: -1 to 1 along both sides.
    at = (starts / starts.new_tensor((width / short, height / short))).clamp(-1, 1)
    features = F.grid_sample(cond[:, :, 0], at[:, None], mode="bilinear", padding_mode="zeros", align_corners=False)
    mixed = torch.einsum("bfhwn,bcn->bcfhw", strength, features[:, :, 0])
    mask = strength.sum(-1)
    later_frames = mixed + cond[:, :, 1:] * (1 - mask.clamp(0, 1))[:, None]
    return torch.cat((cond[:, :, :1], later_frames), dim=2), torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)


@dataclass(frozen=True, kw_only=True)
class TrackedPicture(ImageCondition):
    """The condition of a picture with tracks: starts [B, N, 2], points [B, F, N, 3] as in `latent_tracks`.

    temperature, topk: as in `painted`. start, end: the part of the steps (0..1) in which the tracks are there.
    """

    starts: Tensor
    points: Tensor
    temperature: float = 220.0
    topk: int = 2
    start: float = 0.0
    end: float = 1.0

    def window(self, window: Window) -> Self:
        """The picture, as for other windows, and where the tracks are in the window's frames."""
        return replace(super().window(window), points=self.points[:, list(window.latents)])

    def painted(self) -> ImageCondition:
        """The condition with the tracks in it."""
        how = {"temperature": self.temperature, "topk": self.topk}
        cond, mask = painted(self.cond, self.starts, self.points, **how)
        return ImageCondition(cond, mask[:, None].expand_as(self.mask))


@dataclass(frozen=True)
class MotionTracks(Payload):
    """What the node gives to a model; fields as in TrackedPicture, with one row each. The picture comes with the run.

    picture: the run's condition in which they are painted.
    """

    starts: Tensor
    points: Tensor
    temperature: float = 220.0
    topk: int = 2
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "ATI tracks move what a start picture shows: connect WanVideoImageToVideoEncode to image_embeds, and load an "
        "image-to-video model."
    )

    def joined(self, payloads: tuple[Payload, ...]) -> tuple[Payload, ...]:
        """The tracks in the run's picture. Raises ValueError without one, and for a video of another length."""
        picture = next((p for p in payloads if isinstance(p, ImageCondition)), None)
        if picture is None:
            raise ValueError(self.needs)
        frames = self.points.shape[1]
        if type(picture) is not ImageCondition or picture.cond.shape[2] != frames:
            raise ValueError(
                f"ATI tracks are for a plain picture and {4 * frames - 3} frames without reference latents, but the "
                f"image embeds are {type(picture).__name__} with {picture.cond.shape[2]} latent frames in the place of "
                f"{frames}: set num_frames to {4 * frames - 3}, and connect no other tracks and no extra_latents."
            )
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        tracked = TrackedPicture(cond=picture.cond, mask=picture.mask, **own)
        return tuple(tracked if payload is picture else payload for payload in payloads if payload is not self)


@dataclass(frozen=True)
class AnyTrajectory(ImageToVideo):
    """Joins the condition with tracks in the place of the picture's own."""

    payload: ClassVar[type] = TrackedPicture

    def latents(self, model: WanModel, payload: TrackedPicture, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """The condition with tracks in their steps, and without in others. Raises ValueError as ImageToVideo's."""
        if model.config.in_dim - latents.shape[1] == payload.cond.shape[1]:
            raise ValueError(
                "ATI tracks are painted into the mask of the condition, too, which this model does not read: load an "
                "image-to-video model (its patch_embedding.weight reads 36 channels)."
            )
        inside = inputs.step.within(payload.start, payload.end)
        return super().latents(model, payload.painted() if inside else payload, latents, inputs)


EXTENSION = AnyTrajectory
