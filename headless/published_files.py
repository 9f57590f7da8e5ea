"""Where model files are published, and how large they are, by their names; sizes are rounded.

Some were published anew under another name than graphs have saved: their row has the present one as its path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..host.protocol import DEMO_MODELS


@dataclass(frozen=True)
class Published:
    """A file, or a series of files, on Hugging Face.

    pattern: matches the whole file name, in any case. path: inside the repository; "{}" is the name. gigabytes: of one
    file, 10^9 bytes.
    """

    pattern: str
    repository: str
    path: str
    gigabytes: float

    def url(self, name: str) -> str:
        """Where the file of this name can be looked at."""
        return f"https://huggingface.co/{self.repository}/blob/main/{self.path.format(name)}"


KIJAI, SCALED, GGUF = "Kijai/WanVideo_comfy", "Kijai/WanVideo_comfy_fp8_scaled", "Kijai/WanVideo_comfy_GGUF"
LONGCAT = "Kijai/LongCat-Video_comfy"
WAN21, WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
PUBLISHED = (
    Published(r"wan2\.1_t2v_1\.3B_(fp16|bf16)\.safetensors", WAN21, "split_files/diffusion_models/{}", 2.8),
    Published(r"wan2\.2_ti2v_5B_fp16\.safetensors", WAN22, "split_files/diffusion_models/{}", 10.0),
    Published(r"Wan2_1-T2V-14B_fp8_e4m3fn\.safetensors", KIJAI, "{}", 14.9),
    Published(r"Wan2_1-T2V-14B(-Phantom)?_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "T2V/{}", 14.9),
    Published(r"Wan2_1-I2V-14B-(480P|720P)_fp8_e4m3fn\.safetensors", KIJAI, "{}", 17.0),
    Published(r"Wan2_1-I2V-14B-(480p|720p|MAGREF)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "I2V/{}", 17.0),
    Published(r"Wan2_2-I2V-A14B-(HIGH|LOW)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "I2V/{}", 15.0),
    Published(r"wan2\.1-i2v-14b-480p-Q8_0\.gguf", "city96/Wan2.1-I2V-14B-480P-gguf", "{}", 18.0),
    Published(r"Wan2_1-InfiniteTalk_(Single|Multi)_Q8\.gguf", GGUF, "InfiniteTalk/{}", 2.7),
    Published(
        r"Wan2_1-InfiniteTalk-(Single|Multi)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "InfiniteTalk/{}", 2.8
    ),
    Published(r"Wan2_1-VACE_module_14B_fp8_e4m3fn\.safetensors", KIJAI, "{}", 3.1),
    Published(
        r"Wan21[-_]SkyReelsV3-A2V_fp8_scaled_mixed\.safetensors",
        SCALED,
        "SkyReelsV3/Wan21-SkyReelsV3-A2V_fp8_scaled_mixed.safetensors",
        19.0,
    ),
    Published(r"Wan2_1-VACE_module_1_3B_bf16\.safetensors", KIJAI, "{}", 1.5),
    Published(r"Wan2_1-FLF2V-14B-720P_fp8_e4m3fn\.safetensors", KIJAI, "{}", 17.0),
    Published(
        r"Wan2_1(-Wan)?-I2V-ATI-14B_fp8_e4m3fn\.safetensors", KIJAI, "Wan2_1-I2V-ATI-14B_fp8_e4m3fn.safetensors", 17.0
    ),
    Published(r"Wan2_1-T2V-1-3B-EchoShot_fp16\.safetensors", KIJAI, "EchoShot/{}", 2.8),
    Published(r"Wan2_1-T2V-1_3B_FlashVSR_fp32\.safetensors", KIJAI, "FlashVSR/{}", 5.7),
    Published(r"Wan2_1_FlashVSR_LQ_proj_model_bf16\.safetensors", KIJAI, "FlashVSR/{}", 0.58),
    Published(r"Wan2_1_FlashVSR_TCDecoder_fp32\.safetensors", KIJAI, "FlashVSR/{}", 0.18),
    Published(r"fantasytalking_fp16\.safetensors", KIJAI, "{}", 1.7),
    Published(r"Wan2_1_FantasyPortrait_fp16\.safetensors", KIJAI, "FantasyPortrait/{}", 2.0),
    Published(r"Wan2_1_MTV-Crafter_motion_adapter_bf16\.safetensors", KIJAI, "MTVCrafter/{}", 2.1),
    Published(r"Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32\.safetensors", KIJAI, "Skyreels/{}", 5.7),
    Published(r"Wan2_1_UniLumos_1_3B_bf16\.safetensors", KIJAI, "UniLumos/{}", 2.8),
    Published(r"Wan2_1_kwai_recammaster_1_3B_step20000_bf16\.safetensors", KIJAI, "{}", 3.0),
    Published(r"Wan2_1-T2V-Lynx_full_ref_layers_fp16\.safetensors", KIJAI, "Lynx/{}", 4.2),
    Published(r"Wan2_1-T2V-Lynx_lite_ip_layers_fp16\.safetensors", KIJAI, "Lynx/{}", 0.84),
    Published(r"lynx_lite_resampler_fp32\.safetensors", KIJAI, "Lynx/{}", 0.33),
    Published(r"Wan2_2-TI2V-5B-FastWanFullAttn_bf16\.safetensors", KIJAI, "FastWan/{}", 10.0),
    Published(
        r"Wan_2_[12]_Ovi_video_model_bf16\.safetensors", KIJAI, "Ovi/Wan_2_2_Ovi_video_model_bf16.safetensors", 11.1
    ),
    Published(
        r"Wan_2_[12]_Ovi_audio_model_bf16\.safetensors", KIJAI, "Ovi/Wan_2_2_Ovi_audio_model_bf16.safetensors", 12.2
    ),
    Published(r"Wan2_1-HuMo-14B_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "HuMo/{}", 17.3),
    Published(r"Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "S2V/{}", 16.7),
    Published(r"Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "Wan22Animate/{}", 18.4),
    Published(
        r"Wan2_2-Fun-Control-A14B-(HIGH|LOW)_fp8_e4m3fn_scaled_KJ_fixed\.safetensors", SCALED, "Fun/{}", 14.5
    ),
    Published(
        r"Wan2_2-Fun-Control-Camera-A14B-(HIGH|LOW)_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "Fun/{}", 15.5
    ),
    Published(r"Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "T2V/{}", 14.5),
    Published(
        r"Wan2_2-T2V-A14B[-_]HIGH_fp8_e4m3fn_scaled_KJ\.safetensors",
        SCALED,
        "T2V/Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
        14.5,
    ),
    Published(r"Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "SCAIL/{}", 16.6),
    Published(
        r"(Wan2\.1-SteadyDancer_fp8|Wan21_SteadyDancer_fp8_e4m3fn)_scaled_KJ\.safetensors",
        SCALED,
        "SteadyDancer/Wan21_SteadyDancer_fp8_e4m3fn_scaled_KJ.safetensors",
        16.6,
    ),
    Published(r"Wan21-OneToAllAnimation_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "OneToAllAnimation/{}", 19.4),
    Published(r"Wan21-WanMove_fp8_scaled_e4m3fn_KJ\.safetensors", SCALED, "WanMove/{}", 16.6),
    Published(r"Wan2_1_mocha-14B-preview_fp8_e4m3fn_scaled_KJ\.safetensors", SCALED, "MoCha/{}", 14.5),
    Published(r"LongCat_TI2V_comfy_fp8_e4m3fn_scaled_KJ\.safetensors", LONGCAT, "{}", 14.2),
    Published(
        r"LongCat-Avatar(_comfy)?_bf16\.safetensors", LONGCAT, "Avatar/LongCat-Avatar_comfy_bf16.safetensors", 31.7
    ),
    Published(r"wan2\.1_fun_control_1\.3B_bf16\.safetensors", WAN21, "split_files/diffusion_models/{}", 3.1),
    Published(
        r"Wan2\.1-Fun-V1\.1-1\.3B-Control-Camera\.safetensors",
        "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
        "diffusion_pytorch_model.safetensors",
        3.2,
    ),
    Published(r"whisper_large_v3_encoder_fp16\.safetensors", KIJAI, "HuMo/{}", 1.3),
    Published(r"Wan2_1_VAE_bf16\.safetensors", KIJAI, "{}", 0.25),
    Published(r"Wan2_2_VAE_bf16\.safetensors", KIJAI, "{}", 1.4),
    Published(r"umt5-xxl-enc-bf16\.safetensors", KIJAI, "{}", 11.4),
    Published(r"umt5-xxl-enc-fp8_e4m3fn\.safetensors", KIJAI, "{}", 6.7),
    Published(r"umt5_xxl_fp16\.safetensors", WAN21, "split_files/text_encoders/{}", 11.4),
    Published(r"umt5_xxl_fp8_e4m3fn_scaled\.safetensors", WAN21, "split_files/text_encoders/{}", 6.7),
    Published(r"clip_vision_h\.safetensors", WAN21, "split_files/clip_vision/{}", 1.3),
    Published(r"open-clip-xlm-roberta-large-vit-huge-14_visual_fp16\.safetensors", KIJAI, "{}", 1.3),
    Published(r"wav2vec2-chinese-base_fp16\.safetensors", "Kijai/wav2vec2_safetensors", "{}", 0.19),
    Published(r"lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16\.safetensors", KIJAI, "Lightx2v/{}", 0.74),
    # Saved graphs write the name with a last '_' that the published file does not have.
    Published(
        r"lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16_?\.safetensors",
        KIJAI,
        "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors",
        0.63,
    ),
    Published(r"MelBandRoformer_fp16\.safetensors", "Kijai/MelBandRoFormer_comfy", "{}", 0.46),
    # The size of the float32 checkpoint that both were made of (KimberleyJSN/melbandroformer, 913 MB).
    Published(r"MelBandRoformer_fp32\.safetensors", "Kijai/MelBandRoFormer_comfy", "{}", 0.91),
)

# Where files with such names, in any case, are published, for those that PUBLISHED does not have.
PLACES = (
    (r"longcat.*\.safetensors", LONGCAT),
    (r"wan2[_.]?[12].*fp8.*scaled.*\.safetensors", SCALED),
    (r"(wan2_?[12][_-]|wananimate|lightx2v_|lynx_|mmaudio_|mtv_crafter_).*\.safetensors", KIJAI),
)


def published(name: str) -> Published | None:
    """What is known of a file by its name, in whatever subfolder; None if nothing."""
    base = PurePosixPath(name.replace("\\", "/")).name
    return next((row for row in PUBLISHED if re.fullmatch(row.pattern, base, re.IGNORECASE)), None)


def likely_place(name: str) -> str:
    """What can be said of a file whose own link is not known."""
    base = PurePosixPath(name).name
    if any(DEMO_MODELS.rglob(base)):
        return f"it comes with this pack: --models {DEMO_MODELS}"
    repository = next((place for pattern, place in PLACES if re.fullmatch(pattern, base, re.IGNORECASE)), None)
    if repository is None:
        return "where it is published is not known here"
    return f"its link is not known here; files with such names are in https://huggingface.co/{repository}/tree/main"
