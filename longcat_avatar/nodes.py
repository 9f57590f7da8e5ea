"""Nodes of LongCat-Video-Avatar: one part of a talking video, which goes on from the part before.

Source: meituan-longcat/LongCat-Video (longcat_video/pipeline_longcat_video_avatar.py).
"""

from __future__ import annotations

import logging

from torch import Tensor

from ..longcat.given import Continuation, GivenFrames
from ..multitalk.audio import MultiTalkEmbeds
from ..node_tools import CATEGORY, FRAMES_TIP, Inputs, Latent, mappings, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .nodes_whisper import LongCatAvatarWhisperEmbeds
from .speech import PADDINGS, STRIDE, LongCatSpeech, WhisperSpeech, lengthened

log = logging.getLogger("wanvideo")


class WanVideoLongCatAvatarExtendEmbeds:
    """The next part of a LongCat avatar video."""

    DISPLAY_NAME = "WanVideo LongCat Avatar Extend Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "EXECUTE_NORMALIZED"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "LATENT")
    RETURN_NAMES = ("image_embeds", "samples_slice")
    DESCRIPTION = (
        "LongCat avatar: the next part of a talking video, which goes on from the last frames of the part before and "
        "keeps to a reference. For the first part, prev_latents is the encoded picture and overlap 1."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        whole = {"step": 1}
        return {
            "required": {
                "prev_latents": ("LATENT", {"tooltip": "All latents of the video before, or the encoded picture"}),
                "audio_embeds": (
                    "MULTITALK_EMBEDS",
                    {"tooltip": "The whole speech: for 1.0 at twice the frame rate, for 1.5 by LongCat Avatar Whisper"},
                ),
                "num_frames": ("INT", {"default": 93, "min": 1, "max": 256, **whole, "tooltip": FRAMES_TIP}),
                "overlap": (
                    "INT",
                    {"default": 13, "min": 0, "max": 16, **whole, "tooltip": "Frames of prev_latents; 0: none"},
                ),
                "frames_processed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 10000, **whole, "tooltip": "Length of the video before, in frames"},
                ),
                "if_not_enough_audio": (
                    list(PADDINGS),
                    {
                        "default": PADDINGS[0],
                        "tooltip": "What follows the speech: its start, held, or its end mirrored",
                    },
                ),
                "ref_frame_index": (
                    "INT",
                    {"default": 10, "min": 0, "max": 1000, **whole, "tooltip": "Where in time the reference stands"},
                ),
                "ref_mask_frame_range": (
                    "INT",
                    {"default": 3, "min": 0, "max": 20, **whole, "tooltip": "Latents around it that do not see it"},
                ),
            },
            "optional": {
                "ref_latent": ("LATENT", {"tooltip": "The reference: the first picture or latent of the whole video"}),
                "samples": ("LATENT", {"tooltip": "A whole video to start from; its part is the second output"}),
                "prev_images": ("IMAGE", {"tooltip": "1.5: the decoded video before, whose end is encoded anew"}),
                "vae": ("WANVAE", {"tooltip": "Encodes prev_images"}),
            },
        }

    def EXECUTE_NORMALIZED(
        self,
        prev_latents: Latent,
        audio_embeds: MultiTalkEmbeds,
        num_frames: int,
        overlap: int,
        frames_processed: int,
        if_not_enough_audio: str,
        ref_frame_index: int,
        ref_mask_frame_range: int,
        ref_latent: Latent | None = None,
        samples: Latent | None = None,
        prev_images: Tensor | None = None,
        vae: WanVAE | None = None,
    ) -> tuple[ImageEmbeds, Latent | None]:
        """Embeds of what is given and heard, and the part of `samples`. Raises ValueError where these do not fit."""
        num_frames = whole_frames(num_frames)
        before, made = prev_latents["samples"][0].float(), latent_frames(num_frames)
        known = latent_frames(overlap) if overlap else 0
        if known and prev_images is not None:
            before = _encoded(prev_images, vae, overlap, before)
        if known > before.shape[1]:
            raise ValueError(
                f"overlap {overlap} takes {known} latent frames, but prev_latents has {before.shape[1]}: lower it."
            )
        if known >= made:
            raise ValueError(f"overlap {overlap} leaves nothing of {num_frames} frames to make: raise num_frames.")
        reference = None if ref_latent is None else ref_latent["samples"][0, :, :1].float()
        if reference is not None and reference.shape[2:] != before.shape[2:]:
            raise ValueError(
                f"ref_latent is {tuple(reference.shape[2:])} high and wide and prev_latents "
                f"{tuple(before.shape[2:])}: encode the reference at the size of the video."
            )
        given = before[:, before.shape[1] - known :] if known else None
        embeds = ImageEmbeds(
            latent_shape=(before.shape[0], made, *before.shape[2:]),
            num_frames=num_frames,
            payloads=(
                *_given(known, made, reference is not None, ref_frame_index, ref_mask_frame_range),
                _speech(audio_embeds, num_frames, overlap, frames_processed, if_not_enough_audio),
            ),
            modifiers=() if given is None and reference is None else (Continuation(given, reference),),
        )
        return embeds, None if samples is None else _part(samples, frames_processed, made)


def _encoded(images: Tensor, vae: WanVAE | None, overlap: int, before: Tensor) -> Tensor:
    """Latents [C, T, H, W] of the last `overlap` pictures. Raises ValueError where they cannot go before the part."""
    if vae is None:
        raise ValueError("prev_images are encoded by a VAE: connect WanVideo VAE Loader to 'vae', or disconnect them.")
    if len(images) < overlap:
        raise ValueError(f"overlap {overlap} takes as many of prev_images, but there are {len(images)}: lower it.")
    try:
        latents = vae.encode(to_video(images[-whole_frames(overlap) :]))
    finally:
        vae.managed.release()
    if latents.shape[2:] != before.shape[2:]:
        raise ValueError(
            f"prev_images are {tuple(latents.shape[2:])} in latents and prev_latents {tuple(before.shape[2:])}: give "
            "the decoded pictures of prev_latents."
        )
    return latents


def _given(known: int, made: int, referred: bool, position: int, reach: int) -> tuple[GivenFrames, ...]:
    """known of `made` latent frames are given, and a reference in front if there is one (referred)."""
    frames = known + referred
    if not frames:
        return ()
    apart, unseeing = int(frames > 1), None
    # In frames that are made: those within reach of the reference's place in the video.
    first, last = position - reach - frames + 1, position + reach - frames + 2
    if apart and reach and first >= 0 and last <= made + referred - frames:
        unseeing = (frames + first, frames + last)
    return (GivenFrames(frames=frames, apart=apart, position=position if referred else None, unseeing=unseeing),)


def _speech(embeds: MultiTalkEmbeds, num_frames: int, overlap: int, processed: int, padding: str) -> LongCatSpeech:
    features = lengthened(embeds.features, processed + num_frames, padding)
    if features is not embeds.features:
        log.warning("The speech has %d features, and %d are needed: %s.", embeds.num_frames, len(features[0]), padding)
    stride = 1 if isinstance(embeds, WhisperSpeech) else STRIDE
    return LongCatSpeech(
        features=features,
        scale=embeds.scale,
        cfg_scale=embeds.cfg_scale,
        masks=embeds.masks,
        start=(processed - overlap) * stride if processed else 0,
        frames=num_frames,
        stride=stride,
    )


def _part(samples: Latent, processed: int, made: int) -> Latent:
    start = latent_frames(processed) if processed else 0
    return {**samples, "samples": samples["samples"][:, :, start : start + made].clone()}


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoLongCatAvatarExtendEmbeds, LongCatAvatarWhisperEmbeds
)
