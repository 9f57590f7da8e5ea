"""Systems of the original pack that this version does not have: how their files are told, to refuse them by name.

A row goes when its system comes.
"""

from __future__ import annotations

from .wanvideo.systems import Unbuilt

# Files with these keys are Wan transformers whose extra weights would be ignored, so that they would run wrongly.
UNBUILT_KEYS = (
    Unbuilt(r"\.cross_attn\.emo_k_proj\.weight$|ip_adapter_single_stream", "FlashPortrait"),
)
