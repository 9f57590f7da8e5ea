"""Sizes of the demo's models, and how long they are trained."""

from __future__ import annotations

from ...clip_image.extension import ClipImageExtension
from ...multitalk.extension import MultiTalk
from ...wanvideo.config import WanConfig
from ...wanvideo.modules.vae_keys import VaeLayout
from .. import tiny

VAE = VaeLayout(
    base_dim=16,
    decoder_base_dim=16,
    z_dim=16,
    stages=(1, 2, 3, 3),
    res_blocks=1,
    temporal=(False, True, True),
    channels=3,
    nested=False,
)
TRANSFORMER = WanConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=6, in_dim=36, out_dim=16, text_dim=tiny.TEXT_DIM)
IMAGE = ClipImageExtension(clip_dim=tiny.CLIP_DIM)
SPEECH = MultiTalk(
    features=tiny.SPEECH_LAYERS * tiny.SPEECH_DIM,
    intermediate_dim=128,
    context_tokens=8,
    output_dim=64,
    voiced=tuple(range(TRANSFORMER.num_layers)),
)
CLIP_PATCH = 28
WINDOW_FRAMES, MOTION_FRAMES = 33, 9
