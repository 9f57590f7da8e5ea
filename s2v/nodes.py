"""The node of Wan2.2-S2V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from ..wanvideo.advice import warn_of_cut
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds
from .audio import ENCODER_RATE, FRAME_RATE, frame_features
from .extension import SpeechToVideo
from .loop import SpeechLoop

LAYERS = "encoded_audio_all_layers"


class WanVideoAddS2VEmbeds:
    """Conditions a Wan2.2-S2V video on speech, a reference picture and poses."""

    DESCRIPTION = "Conditions a Wan2.2-S2V video on speech, a reference picture and a pose video."
    DISPLAY_NAME = "WanVideo Add S2V Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "INT")
    RETURN_NAMES = ("image_embeds", "audio_frame_count")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        size = "Frames sampled at once: 80 with enable_framepack, else the number of frames of the video"
        loop = "Make the video in windows, each going on from the one before; not with context windows"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and length of the video: WanVideoEmptyEmbeds"}),
                "frame_window_size": ("INT", {"default": 80, "min": 1, "max": 100000, "step": 1, "tooltip": size}),
                "audio_scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.1, "tooltip": "Strength of the speech"},
                ),
                "pose_start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Where in the steps the poses begin to act"},
                ),
                "pose_end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "Where the poses stop acting"}),
            },
            "optional": {
                "audio_encoder_output": (
                    "AUDIO_ENCODER_OUTPUT",
                    {"tooltip": "Speech, from AudioEncoderEncode with wav2vec2-large-xlsr-53-english"},
                ),
                "ref_latent": ("LATENT", {"tooltip": "Who speaks, from WanVideoEncode at the size of the video"}),
                "pose_latent": ("LATENT", {"tooltip": "Drawn poses, from WanVideoEncode at the size of the video"}),
                "vae": ("WANVAE", {"tooltip": "Needed for enable_framepack"}),
                "enable_framepack": ("BOOLEAN", {"default": False, "tooltip": loop}),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        frame_window_size: int,
        audio_encoder_output: Mapping[str, object] | None = None,
        audio_scale: float = 1.0,
        ref_latent: Latent | None = None,
        pose_latent: Latent | None = None,
        vae: WanVAE | None = None,
        pose_start_percent: float = 0.0,
        pose_end_percent: float = 1.0,
        enable_framepack: bool = False,
    ) -> tuple[ImageEmbeds, int]:
        """The embeds with S2V's conditions, and how many frames the speech and the silence behind it fill."""
        audio = None
        if audio_encoder_output is not None:
            if not audio_encoder_output.get(LAYERS):
                raise ValueError(f"audio_encoder_output has no '{LAYERS}': connect AudioEncoderEncode of ComfyUI.")
            layers = audio_encoder_output[LAYERS]
            warn_of_cut("The speech", layers[0].shape[1] / ENCODER_RATE, embeds.num_frames / FRAME_RATE)
            audio = frame_features(layers, embeds.num_frames, frame_window_size)
        loop = embeds.loop
        if enable_framepack:
            if vae is None or audio is None:
                raise ValueError("enable_framepack needs vae and audio_encoder_output: connect both, or turn it off.")
            loop = SpeechLoop(vae=vae, window_frames=frame_window_size)
        speech = SpeechToVideo(
            audio=audio,
            scale=torch.tensor(float(audio_scale)),
            reference=None if ref_latent is None else ref_latent["samples"][:1],
            pose=None if pose_latent is None else pose_latent["samples"][:1],
            start=pose_start_percent,
            end=pose_end_percent,
        )
        frames = 0 if audio is None else audio.shape[-1]
        return replace(embeds, payloads=(*embeds.payloads, speech), loop=loop), frames


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAddS2VEmbeds)
