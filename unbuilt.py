"""Systems of the original pack that this version does not have: how their files are told, to refuse them by name.

A row goes out of use by itself when a system of the registry owns its keys or names its files.
"""

from __future__ import annotations

from .wanvideo.families import Kind
from .wanvideo.systems import Unbuilt

UNBUILT_FILES = (
    Kind("Uni3C controlnet", "", (r"^controlnet_patch_embedding\.weight$",), whole=True),
    Kind("Wan ControlNet", "", (r"^control_encoder\.0\.0\.weight$",), whole=True),
    Kind("Ovi audio module", "", (r"^audio_model\.patch_embedding\.0\.weight$",), whole=True),
    Kind("VACE module", "", (r"^vace_blocks\.0\.after_proj\.weight$",)),
    Kind("FantasyPortrait module", "", (r"^mouth_proj_model\.", r"^emo_proj_model\.")),
    Kind("FantasyTalking module", "", (r"^proj_model\.proj\.weight$",)),
    Kind("ReCamMaster module", "", (r"^blocks\.0\.cam_encoder\.weight$",)),
)

# Files with these keys are Wan transformers whose extra weights would be ignored, so that they would run wrongly.
UNBUILT_KEYS = (
    Unbuilt(r"^(audio_model|video_model)\.|cross_attn\.k_fusion\.", "Ovi"),
    Unbuilt(r"^vace_blocks\.", "VACE"),
    Unbuilt(r"^control_adapter\.conv\.weight$", "the Fun camera control adapter"),
    Unbuilt(r"^ref_conv\.weight$", "the Fun reference convolution"),
    Unbuilt(r"^fps_embedding\.weight$", "SkyReels V2 diffusion forcing"),
    Unbuilt(r"^audio_injector\.|^casual_audio_encoder\.|^cond_encoder\.weight$", "S2V"),
    Unbuilt(r"^pose_patch_embedding\.weight$|^face_adapter\.", "WanAnimate"),
    Unbuilt(r"^audio_proj\.audio_proj_glob_1\.|\.audio_cross_attn_wrapper\.", "HuMo"),
    Unbuilt(r"\.cam_encoder\.weight$", "ReCamMaster"),
    Unbuilt(r"\.cross_attn\.emo_k_proj\.weight$|ip_adapter_single_stream", "FlashPortrait"),
    Unbuilt(r"^mouth_proj_model\.", "FantasyPortrait"),
    Unbuilt(r"^proj_model\.proj\.weight$|\.cross_attn\.k_proj\.weight$", "FantasyTalking"),
    Unbuilt(r"^LQ_proj_in\.", "FlashVSR"),
    Unbuilt(r"^add_conv_in\.weight$", "UniLumos"),
    Unbuilt(r"^text_projection\.0\.weight$", "BindWeave"),
    Unbuilt(r"^condition_embedding_(align|spatial|temporal)\.|^patch_embedding_fuse\.", "SteadyDancer"),
    Unbuilt(r"^patch_embedding_pose\.weight$", "SCAIL"),
    Unbuilt(r"^image_to_cond\.conv_in\.|\.ref_attn_k_img\.", "One-to-All"),
    Unbuilt(r"\.control_blocks_dense\.", "LongVie2"),
    Unbuilt(r"^(dwpose_embedding|randomref_embedding_pose)\.", "UniAnimate"),
    Unbuilt(r"\.ffn\.w1\.weight$", "LongCat"),
)
