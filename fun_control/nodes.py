"""Nodes that make control signals for Fun models of encoded videos and pictures."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.request import ImageEmbeds
from .extension import ControlSignal

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
START = ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the video controls"})
END = ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the video controls"})
LATENTS = ("LATENT", {"tooltip": "Encoded control video (poses, depth, edges), of the size and length of the video"})
REFERENCE = (
    "LATENT",
    {"tooltip": "Encoded picture that the video is to look like, for Fun Control 1.1 and 2.2; the first frame counts"},
)


class WanVideoControlEmbeds:
    """A control video, and the size and length of the video that goes with it."""

    DISPLAY_NAME = "WanVideo Control Embeds"
    DESCRIPTION = (
        "Control video for Fun Control models. Connect it to the sampler, or to control_embeds of WanVideoEmptyEmbeds "
        "or WanVideoImageToVideoEncode."
    )
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"start_percent": START, "end_percent": END, "latents": LATENTS},
            "optional": {"fun_ref_image": REFERENCE},
        }

    def process(
        self, latents: Latent, start_percent: float, end_percent: float, fun_ref_image: Latent | None = None
    ) -> tuple[ImageEmbeds]:
        """The signal, and sizes for the sampler."""
        signal = _signal(latents, fun_ref_image, start_percent, end_percent)
        shape = tuple(signal.video.shape[1:])
        frames = (shape[1] - 1) * VAE_TIME_STRIDE + 1
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=(signal,)),)


class WanVideoAddControlEmbeds:
    """The same embeds with a control video, in the place of an earlier one."""

    DISPLAY_NAME = "WanVideo Add Control Embeds"
    DESCRIPTION = "Adds a control video or a reference picture for Fun Control models to image embeds."
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        embeds = ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size, length and picture of the video"})
        return {
            "required": {"embeds": embeds, "start_percent": START, "end_percent": END},
            "optional": {"latents": LATENTS, "fun_ref_image": REFERENCE},
        }

    def process(
        self,
        embeds: ImageEmbeds,
        start_percent: float,
        end_percent: float,
        fun_ref_image: Latent | None = None,
        latents: Latent | None = None,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the signal."""
        others = tuple(payload for payload in embeds.payloads if not isinstance(payload, ControlSignal))
        signal = _signal(latents, fun_ref_image, start_percent, end_percent)
        return (replace(embeds, payloads=(*others, signal)),)


def _signal(video: Latent | None, picture: Latent | None, start: float, end: float) -> ControlSignal:
    reference: Tensor | None = None if picture is None else picture["samples"][:1, :, 0].float()
    return ControlSignal(None if video is None else video["samples"][:1].float(), reference, start, end)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoControlEmbeds, WanVideoAddControlEmbeds)
