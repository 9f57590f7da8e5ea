"""The node that encodes the control videos of LongVie 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..image_to_video.pictures import fold_mask
from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.frames import round_frames
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .extension import Continuation, DualControl

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoAddDualControlEmbeds:
    """The same embeds with the control videos and the history of LongVie 2."""

    DISPLAY_NAME = "WanVideo Add Dual Control Embeds"
    DESCRIPTION = (
        "Control by a depth video, by a video of point tracks, or both, for LongVie 2; frames of an earlier clip let "
        "the video go on from it."
    )
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": "How strongly the videos control"}
        level = {"default": 0.925926, "min": 0.0, "max": 1.0, "step": 0.000001}
        noise = "With prev_images: the part of noise that the first frame begins with; the rest is the last of them"
        history = "Frames of the clip before this one, of its size: 8, of which the VAE reads 5, as the model learned"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size, length and picture of the video"}),
                "vae": ("WANVAE", {"tooltip": "The VAE of the model; encodes the videos"}),
                "strength": ("FLOAT", strength),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the videos control"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the videos control"},
                ),
                "first_frame_noise_level": ("FLOAT", {**level, "tooltip": noise}),
            },
            "optional": {
                "dense": ("IMAGE", {"tooltip": "Depth video, bright where it is near; of the video's size and length"}),
                "sparse": ("IMAGE", {"tooltip": "Video of point tracks, of the video's size and length"}),
                "prev_images": ("IMAGE", {"tooltip": history}),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        vae: WanVAE,
        strength: float,
        start_percent: float,
        end_percent: float,
        first_frame_noise_level: float,
        dense: Tensor | None = None,
        sparse: Tensor | None = None,
        prev_images: Tensor | None = None,
    ) -> tuple[ImageEmbeds]:
        """Embeds with the control, in the place of an earlier one. Raises ValueError where no video is connected."""
        if dense is None and sparse is None:
            raise ValueError("LongVie 2 needs a control video: connect 'dense' (depth), 'sparse' (tracks) or both.")
        try:
            control = DualControl(
                strength=torch.tensor(strength),
                # The model learned from depth that is dark where it is near.
                dense=None if dense is None else _encoded(vae, 1 - dense[..., :3]),
                sparse=None if sparse is None else _encoded(vae, sparse),
                history=None if prev_images is None else _history(vae, prev_images),
                start=start_percent,
                end=end_percent,
            )
        finally:
            vae.managed.release()
        others = tuple(payload for payload in embeds.payloads if not isinstance(payload, DualControl))
        modifiers = tuple(modifier for modifier in embeds.modifiers if not isinstance(modifier, Continuation))
        if control.history is not None:
            modifiers += (Continuation(control.history, first_frame_noise_level),)
        return (replace(embeds, payloads=(*others, control), modifiers=modifiers),)


def _encoded(vae: WanVAE, images: Tensor) -> Tensor:
    """A control video as the model reads it: latents, mask, and its first frame alone, [1, C, F, h, w]."""
    video = to_video(images)
    first = torch.zeros_like(video)
    first[:, :1] = video[:, :1]
    latents = vae.encode(video)
    mask = torch.zeros(video.shape[1], *latents.shape[2:])
    mask[0] = 1
    return torch.cat((latents, fold_mask(mask), vae.encode(first)))[None]


def _history(vae: WanVAE, images: Tensor) -> Tensor:
    """Latents [1, z, P, h, w] of the first 4n+1 frames; what is over counts for nothing, as in training."""
    return vae.encode(to_video(images[: round_frames(images.shape[0])]))[None]


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddDualControlEmbeds)
