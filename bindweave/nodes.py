"""The node of BindWeave."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip_image.extension import ClipImage
from ..image_to_video.extension import ImageCondition
from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.conditioning import Payload
from ..wanvideo.request import ImageEmbeds
from .extension import SubjectFrames

MOST_SUBJECTS = 4
# The model was trained with this many CLIP tokens, those of pictures that are missing being zero.
CLIP_TOKENS = MOST_SUBJECTS * 257


class WanVideoAddBindweaveEmbeds:
    """Subjects that the video keeps alike."""

    DISPLAY_NAME = "WanVideo Add Bindweave Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "LATENT", "MASK")
    RETURN_NAMES = ("image_embeds", "image_embed_preview", "mask_preview")
    DESCRIPTION = "BindWeave: up to four pictures of subjects that the video keeps alike. For the BindWeave model."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        hidden = "What Qwen2.5-VL sees in pictures and {}, from TextImageEncodeQwenVL"
        masks = "1 where a picture shows the subject, one mask for each; without them all of it counts"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "From WanVideo ImageToVideo Encode without pictures"}),
                "reference_latents": ("LATENT", {"tooltip": "A batch of encoded pictures at the size of the video"}),
            },
            "optional": {
                "ref_masks": ("MASK", {"tooltip": masks}),
                "qwenvl_embeds_pos": ("QWENVL_EMBEDS", {"tooltip": hidden.format("prompt")}),
                "qwenvl_embeds_neg": ("QWENVL_EMBEDS", {"tooltip": hidden.format("negative prompt")}),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        reference_latents: Latent,
        ref_masks: Tensor | None = None,
        qwenvl_embeds_pos: Tensor | None = None,
        qwenvl_embeds_neg: Tensor | None = None,
    ) -> tuple[ImageEmbeds, Latent, Tensor]:
        """The embeds with subjects, and all condition frames and their mask to look at.

        Raises ValueError without a condition, and for pictures or masks that do not fit.
        """
        condition = next((p for p in embeds.payloads if isinstance(p, ImageCondition)), None)
        if condition is None:
            raise ValueError(
                "BindWeave's subjects come in front of the condition of an image-to-video model: connect the image "
                "embeds of WanVideoImageToVideoEncode."
            )
        frames = _in_front(condition, reference_latents["samples"].float(), ref_masks)
        subjects = SubjectFrames(frames, _float(qwenvl_embeds_pos), _float(qwenvl_embeds_neg))
        payloads = (*(_padded(payload) for payload in embeds.payloads), subjects)
        channels = condition.mask.shape[1]
        preview = torch.cat((frames[:, channels:], condition.cond), dim=2)
        mask = torch.cat((frames[0, 0], condition.mask[0, 0]))
        return replace(embeds, payloads=payloads), {"samples": preview}, mask


def _in_front(condition: ImageCondition, pictures: Tensor, masks: Tensor | None) -> Tensor:
    """Frames [1, 4 + C, 4, H, W] of pictures [n, C, 1, H, W]: mask and latents, zero where there is no picture."""
    height, width = size = tuple(condition.cond.shape[3:])
    shape, count = (condition.cond.shape[1], 1, height, width), len(pictures)
    if tuple(pictures.shape[1:]) != shape or count > MOST_SUBJECTS:
        raise ValueError(
            f"reference_latents are {tuple(pictures.shape)}, but BindWeave takes 1 to {MOST_SUBJECTS} pictures of "
            f"{shape} in latents: encode each alone (WanVideoEncodeLatentBatch) at the width and height of the video."
        )
    given = torch.zeros(condition.mask.shape[1], count, *size)
    if masks is None:
        given[:] = 1
    elif len(masks) != count:
        raise ValueError(f"There are {len(masks)} ref_masks for {count} pictures: connect one for each, or none.")
    else:
        given[0] = F.interpolate(masks[:, None].float(), size=size, mode="nearest")[:, 0]
    known = torch.cat((given, pictures[:, :, 0].transpose(0, 1)))
    return F.pad(known, (0, 0, 0, 0, 0, MOST_SUBJECTS - count))[None]


def _padded(payload: Payload) -> Payload:
    """CLIP features with as many tokens as the model was trained with."""
    if not isinstance(payload, ClipImage):
        return payload
    positive, negative = (
        None if tokens is None else F.pad(tokens, (0, 0, 0, max(CLIP_TOKENS - tokens.shape[1], 0)))
        for tokens in (payload.positive, payload.negative)
    )
    return replace(payload, positive=positive, negative=negative)


def _float(embeds: Tensor | None) -> Tensor | None:
    return None if embeds is None else embeds.float()


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddBindweaveEmbeds)
