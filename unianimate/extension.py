"""UniAnimate-DiT (Wang et al. 2025): drawn poses on the video's tokens, and a drawn reference pose on its picture.

It ships as a LoRA file that has both encoders beside its low-rank pairs. Source: ali-vilab/UniAnimate-DiT.

Shapes: B batch, P frames of the pose video, F latent frames, C channels of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens

MARK = "dwpose_embedding.0.weight"
WIDTH = 16
# How many latent frames away a pose still reaches a latent frame.
REACH = 2
# Channels of an image-to-video model besides the noise: the mask's and the picture's.
PICTURE_CHANNELS = 20


@dataclass(frozen=True)
class Poses(Payload):
    """video [1, 3, P, H, W] and reference [1, 3, H, W]: drawn poses in 0..1, at the size of the video.

    start, end: the part of the steps (0..1) in which they act. places: the latent frames of the video that a forward
    sees, None for all; leading: references before them.
    """

    video: Tensor
    reference: Tensor | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    places: tuple[int, ...] | None = None
    leading: int = 0
    needs: ClassVar[str] = (
        f"UniAnimate needs a model with {MARK}: connect its LoRA (WanVideoLoraSelect) to the 'lora' input of "
        "WanVideoModelLoader."
    )

    def window(self, window: Window) -> Self:
        """The same poses, of which those of the window's frames are read."""
        return replace(self, places=window.video, leading=window.leading)

    def acts(self, inputs: ModelInputs) -> bool:
        """Whether they change this forward."""
        return self.strength != 0 and inputs.step.within(self.start, self.end)


class PoseEncoder(nn.Sequential):
    """Drawn poses to the transformer's tokens: 4 frames of 16 by 16 pixels become one."""

    def __init__(self, dim: int) -> None:
        strides = (1, 1, 1, (1, 2, 2), 2, 2)
        layers: list[nn.Module] = []
        for number, stride in enumerate(strides):
            layers += [nn.Conv3d(WIDTH if number else 3, WIDTH, 3, stride=stride, padding=1), nn.SiLU()]
        super().__init__(*layers, nn.Conv3d(WIDTH, dim, (1, 2, 2), stride=(1, 2, 2)))

    def at(self, video: Tensor, places: tuple[int, ...]) -> Tensor:
        """Poses [1, 3, P, H, W] -> tokens of these latent frames [1, C, n, h, w].

        The first frame stands four times at the beginning, as the VAE reads a video. Frames behind the last latent
        frame of the poses are as that one. Only frames that reach one of the places are encoded.
        """
        video = torch.cat((video[:, :, :1].expand(-1, -1, VAE_TIME_STRIDE - 1, -1, -1), video), dim=2)
        last = (video.shape[2] - 1) // VAE_TIME_STRIDE
        places = tuple(min(place, last) for place in places)
        first = max(min(places) - REACH, 0)
        seen = video[:, :, VAE_TIME_STRIDE * first : VAE_TIME_STRIDE * (max(places) + REACH)]
        return self(seen.to(self[0].weight.dtype))[:, :, [place - first for place in places]]


class ReferenceEncoder(nn.Sequential):
    """A drawn pose [1, 3, H, W] to condition channels [1, 20, H / 8, W / 8]."""

    def __init__(self) -> None:
        strides = (1, 1, 1, 2, 2)
        layers: list[nn.Module] = []
        for number, stride in enumerate(strides):
            layers += [nn.Conv2d(WIDTH if number else 3, WIDTH, 3, stride=stride, padding=1), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(WIDTH, PICTURE_CHANNELS, 3, stride=2, padding=1))


@dataclass(frozen=True)
class UniAnimate(Extension):
    """Two encoders beside the transformer."""

    payload: ClassVar[type] = Poses
    lora_layers: ClassVar[tuple[str, ...]] = ("dwpose_embedding", "randomref_embedding_pose")

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the LoRA is loaded with the model."""
        return cls() if MARK in shapes else None

    def owns(self, key: str) -> bool:
        """Both encoders."""
        return key.startswith(("dwpose_embedding.", "randomref_embedding_pose."))

    def build(self, model: WanModel) -> None:
        """Adds the encoders to the model."""
        model.dwpose_embedding = PoseEncoder(model.config.dim)
        model.randomref_embedding_pose = ReferenceEncoder()

    def latents(self, model: WanModel, payload: Poses, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Adds the reference pose to the channels of mask and picture, in all frames.

        Raises ValueError where there are none, or the pose has another size.
        """
        if payload.reference is None or not payload.acts(inputs):
            return latents
        noise = inputs.latents.shape[1]
        if latents.shape[1] != noise + PICTURE_CHANNELS:
            raise ValueError(
                "UniAnimate's reference_pose_image is added to the encoded picture of an image-to-video model, which "
                "is not here: load such a model and connect WanVideoImageToVideoEncode, or disconnect "
                "reference_pose_image."
            )
        encoder = model.randomref_embedding_pose
        pose = encoder(payload.reference.to(encoder[0].weight.dtype))
        if pose.shape[2:] != latents.shape[3:]:
            raise ValueError(_another_size("reference_pose_image", payload.reference, latents))
        pose = payload.strength * pose[:, :, None].to(latents)
        return torch.cat((latents[:, :noise], latents[:, noise:] + pose), dim=1)

    def prepare(self, model: WanModel, payload: Poses, inputs: ModelInputs, tokens: Tokens) -> tuple[Tokens, None]:
        """Adds the poses to the video's tokens. Raises ValueError where they have another size."""
        if not payload.acts(inputs):
            return tokens, None
        frames, *size = tokens.grid
        places = tuple(range(frames)) if payload.places is None else payload.places
        if not places:
            return tokens, None
        if list(payload.video.shape[3:]) != [8 * side for side in tokens.latents.shape[3:]]:
            raise ValueError(_another_size("pose_images", payload.video, tokens.latents))
        poses = model.dwpose_embedding.at(payload.video, places).flatten(2).transpose(1, 2)
        begin = payload.leading * size[0] * size[1]
        end = begin + poses.shape[1]
        posed = tokens.x[:, begin:end] + payload.strength * poses.to(tokens.x.dtype)
        return tokens._replace(x=torch.cat((tokens.x[:, :begin], posed, tokens.x[:, end:]), dim=1)), None


def _another_size(name: str, pictures: Tensor, latents: Tensor) -> str:
    height, width = pictures.shape[-2:]
    return (
        f"UniAnimate's {name} are {width}x{height} but the video is {8 * latents.shape[4]}x{8 * latents.shape[3]}: "
        "resize them to the video's width and height."
    )


EXTENSION = UniAnimate
