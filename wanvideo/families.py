"""What a checkpoint is, told from its tensor names: for error messages and for `describe`.

Source of the names: the published files of each system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Kind(NamedTuple):
    """A kind of file: name, the node that loads it ("" for none of this pack), patterns that must all be present."""

    name: str
    loader: str
    patterns: tuple[str, ...]


TRANSFORMER = "Wan transformer"
LORA = "LoRA"
MULTITALK = "MultiTalk or InfiniteTalk module"

# The first row that fits names the file, so rows go from the most special to the most general.
KINDS = (
    Kind("Stand-In LoRA", "", (r"self_attn\.q_loras\.down\.weight$",)),
    Kind(LORA, "WanVideo Lora Select", (r"(lora_(A|B|down|up)\b|lora\.(down|up)\.|\.lora_(A|B)\.|\.diff(_b|_m)?$)",)),
    Kind("Uni3C controlnet", "", (r"^controlnet_patch_embedding\.weight$",)),
    Kind("Wan ControlNet", "", (r"^control_encoder\.0\.0\.weight$",)),
    Kind("Ovi audio module", "", (r"^audio_model\.patch_embedding\.0\.weight$",)),
    Kind(TRANSFORMER, "WanVideo Model Loader", (r"^patch_embedding\.weight$", r"^blocks\.0\.self_attn\.q\.weight$")),
    Kind(
        MULTITALK,
        "Multi/InfiniteTalk Model Loader",
        (r"^(multitalk_)?audio_proj\.proj1\.weight$", r"^blocks\.\d+\.audio_cross_attn\."),
    ),
    Kind("VACE module", "", (r"^vace_blocks\.0\.after_proj\.weight$",)),
    Kind("FantasyPortrait module", "", (r"^mouth_proj_model\.", r"^emo_proj_model\.")),
    Kind("FantasyTalking module", "", (r"^proj_model\.proj\.weight$",)),
    Kind("Lynx module", "", (r"cross_attn\.ip_adapter\.to_v_ip\.weight$",)),
    Kind("MTVCrafter module", "", (r"^blocks\.0\.motion_attn\.k\.weight$",)),
    Kind("ReCamMaster module", "", (r"^blocks\.0\.cam_encoder\.weight$",)),
    Kind("Wan VAE", "WanVideo VAE Loader", (r"^(model\.)?decoder\.conv1\.weight$", r"^(model\.)?conv2\.weight$")),
    Kind("Wan VAE in diffusers names", "WanVideo VAE Loader", (r"^decoder\.conv_in\.", r"^post_quant_conv\.")),
    Kind("tiny VAE (TAEHV)", "", (r"^encoder\.0\.weight$", r"^decoder\.1\.weight$")),
    Kind("UMT5 text encoder", "WanVideo T5 Text Encoder Loader", (r"^token_embedding\.weight$", r"attn\.q\.weight$")),
    Kind(
        "UMT5 text encoder",
        "WanVideo T5 Text Encoder Loader",
        (r"^(shared|encoder\.embed_tokens)\.weight$", r"^encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$"),
    ),
    Kind(
        "UMT5 text encoder",
        "WanVideo T5 Text Encoder Loader",
        (r"^token_embd\.weight$", r"^enc\.blk\.0\.attn_rel_b\.weight$"),
    ),
    Kind(
        "CLIP vision encoder",
        "WanVideo CLIP Text Encoder Loader",
        (r"^visual\.transformer\.0\.", r"^visual\.patch_embedding\."),
    ),
    Kind("CLIP vision encoder", "Load CLIP Vision", (r"vision_model\.encoder\.layers\.0\.",)),
    Kind("wav2vec2 speech encoder", "Wav2vec2 Model Loader", (r"^(wav2vec2\.)?feature_extractor\.conv_layers\.0\.",)),
    Kind("Whisper speech encoder", "", (r"^(model\.)?encoder\.embed_positions\.weight$", r"encoder\.conv1\.weight$")),
    Kind("Stable Diffusion checkpoint", "", (r"(^|\.)input_blocks\.0\.0\.weight$",)),
    Kind("Flux or Hunyuan transformer", "", (r"(^|\.)double_blocks\.0\.",)),
    Kind("MMDiT transformer (SD3 or the like)", "", (r"(^|\.)joint_blocks\.0\.",)),
)


class Unbuilt(NamedTuple):
    """A pattern of keys, one of which gives a system away, and the system's name."""

    pattern: str
    system: str


# Files with these keys are Wan transformers whose extra weights would be ignored, so that they would run wrongly.
SYSTEMS = (
    Unbuilt(r"^(audio_model|video_model)\.|cross_attn\.k_fusion\.", "Ovi"),
    Unbuilt(r"^vace_blocks\.", "VACE"),
    Unbuilt(r"^control_adapter\.conv\.weight$", "the Fun camera control adapter"),
    Unbuilt(r"^ref_conv\.weight$", "the Fun reference convolution"),
    Unbuilt(r"^fps_embedding\.weight$", "SkyReels V2 diffusion forcing"),
    Unbuilt(r"^audio_injector\.|^casual_audio_encoder\.|^cond_encoder\.weight$", "S2V"),
    Unbuilt(r"^pose_patch_embedding\.weight$|^face_adapter\.", "WanAnimate"),
    Unbuilt(r"^audio_proj\.audio_proj_glob_1\.|\.audio_cross_attn_wrapper\.", "HuMo"),
    Unbuilt(r"\.motion_attn\.k\.weight$", "MTVCrafter"),
    Unbuilt(r"\.ref_adapter\.to_k_ref\.weight$|\.ip_adapter\.to_v_ip\.weight$", "Lynx"),
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


def kind_of(shapes: Shapes) -> Kind | None:
    """What a file with these tensors is, or None where no row fits."""
    keys = list(shapes)
    for kind in KINDS:
        if all(any(re.search(pattern, key) for key in keys) for pattern in kind.patterns):
            return kind
    return None


def unbuilt_systems(shapes: Shapes) -> dict[str, str]:
    """Systems of the table above that these tensors belong to: name -> the first key that shows it."""
    found: dict[str, str] = {}
    for row in SYSTEMS:
        key = next((k for k in shapes if re.search(row.pattern, k)), None)
        if key is not None:
            found.setdefault(row.system, key)
    return found
