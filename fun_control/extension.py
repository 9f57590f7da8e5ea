"""Control models of VideoX-Fun (1.0, 1.1, 2.2): a control video as channels, a reference picture as tokens.

Source: aigc-apps/VideoX-Fun (wan_transformer3d, pipeline_wan2_2_fun_control).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

REFERENCE = "ref_conv.weight"
CAMERA = "control_adapter.conv.weight"
MASK_CHANNELS = 4


@dataclass(frozen=True)
class ControlSignal(Payload):
    """video [1, C, F, H, W]: encoded control video, or None; reference [1, C, H, W]: an encoded picture, or None.

    start, end: the part of the steps (0..1) in which the video controls; the reference is there in all.
    """

    video: Tensor | None = None
    reference: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "This model has no channels for a control video: load a Fun Control model (its patch_embedding.weight reads 48 "
        "or 52 channels; 148 for the 5B), or connect a control LoRA to WanVideoModelLoader."
    )
    fills_channels: ClassVar[bool] = True

    def window(self, window: Window) -> Self:
        """The frames of the window."""
        return self if self.video is None else replace(self, video=part_of(window, self.video, "control video"))

    def fills(self, step: Step) -> bool:
        """In the part of the steps in which the video controls."""
        return self.video is not None and step.within(self.start, self.end)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the model's convolutions read them."""
        return super().to(device, torch.float32)


def part_of(window: Window, frames: Tensor, what: str) -> Tensor:
    """Of frames [B, C, F, ...], one for each latent of the run, those of the window.

    Raises ValueError if there are fewer, or for the whole video more, than the run has. what: its name in the message.
    """
    count = frames.shape[2]
    places = window.latents_in(count)
    needed = len(places) if window.whole else max(places) + 1
    if count < needed or (window.whole and count > needed):
        raise ValueError(
            f"The {what} has {count} latent frames but the video has {needed}{'' if window.whole else ' or more'}: "
            "give both the same number of frames."
        )
    return frames[:, :, places]


def with_empty_picture(model: WanModel, payload: Payload, latents: Tensor, inputs: ModelInputs) -> Tensor:
    """The latents with all channels that the model reads, unless another payload than this one brings a picture's."""
    room = model.config.in_dim - latents.shape[1]
    if room <= 0 or any(model.joins(other) for other in inputs.payloads if other is not payload):
        return latents
    return torch.cat((latents, latents.new_zeros(latents.shape[0], room, *latents.shape[2:])), dim=1)


@dataclass(frozen=True)
class FunControl(Extension):
    """reference_dim: channels that ref_conv reads, 0 where the file has none (1.0)."""

    reference_dim: int = 0
    payload: ClassVar[type] = ControlSignal

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the patch embedding reads control beside the noise, alone or in front of a picture.

        A camera model reads as many channels as control alone would have: there they are the picture's.
        """
        reference = shapes.get(REFERENCE, (0, 0))[1]
        patches, head = shapes.get("patch_embedding.weight"), shapes.get("head.head.weight")
        if patches is None or head is None:
            return None
        predicts = head[0] // (patches[2] * patches[3] * patches[4])
        room = patches[1] - predicts
        controls = room in (predicts, 2 * predicts, 2 * predicts + MASK_CHANNELS) and CAMERA not in shapes
        return cls(reference) if controls or reference else None

    def owns(self, key: str) -> bool:
        """The reference convolution."""
        return self.reference_dim > 0 and key.startswith("ref_conv.")

    def build(self, model: WanModel) -> None:
        """Adds ref_conv where the file has it."""
        if self.reference_dim:
            patch = model.config.patch_size[1:]
            model.ref_conv = nn.Conv2d(self.reference_dim, model.config.dim, kernel_size=patch, stride=patch)

    def latents(self, model: WanModel, payload: ControlSignal, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Joins the control video behind the noise, outside its steps an empty one; a picture and its mask follow.

        Where none is connected, their channels are empty too.
        """
        channels = model.config.out_dim
        control = latents.new_zeros(1, channels, *latents.shape[2:])
        if payload.fills(inputs.step):
            if payload.video.shape[1:] != control.shape[1:]:
                raise ValueError(
                    f"The control video has latents {tuple(payload.video.shape[1:])} but the video has "
                    f"{tuple(control.shape[1:])} (channels, frames, height, width): encode it at the video's size with "
                    "the VAE of this model."
                )
            control = payload.video.to(latents)
        joined = torch.cat((latents, control.expand(latents.shape[0], -1, -1, -1, -1)), dim=1)
        return with_empty_picture(model, payload, joined, inputs)

    def prepare(
        self, model: WanModel, payload: ControlSignal, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """The reference is a frame in front of the video: its tokens come last, but at time 0, the video's later."""
        if payload.reference is None:
            return tokens, None
        if not self.reference_dim:
            raise ValueError(
                "The model has no ref_conv.weight, so it cannot read fun_ref_image: load a Fun Control model of "
                "version 1.1 or 2.2, or disconnect the reference."
            )
        _, height, width = tokens.grid
        picture = payload.reference.to(model.ref_conv.weight.dtype)
        patches = model.ref_conv(picture) if picture.shape[1] == self.reference_dim else None
        if patches is None or tuple(patches.shape[2:]) != (height, width):
            raise ValueError(
                f"fun_ref_image has latents {tuple(payload.reference.shape[1:])} (channels, height, width), which do "
                "not fit the video: encode the picture at the video's width and height, with the VAE of this model."
            )
        reference = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)
        later = model.rope(tokens.grid, start=(1, 0, 0), riflex_index=inputs.riflex_index, device=tokens.x.device)
        first = tokens.rope[: height * width]
        moved = tokens._replace(rope=torch.cat((later, tokens.rope[video_tokens(tokens.grid) :])))
        # Where frames differ in time, as with given first frames, the reference is as noisy as the last one.
        return moved.appended(reference.expand(tokens.x.shape[0], -1, -1), first, tokens.last_frame_mod), None


EXTENSION = FunControl
