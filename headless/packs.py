"""Which node pack a foreign node comes from, for messages."""

from __future__ import annotations

import re

PACKS = (
    (r"^MelBandRoFormer", "ComfyUI-MelBandRoFormer"),
    (r"^VHS_", "ComfyUI-VideoHelperSuite"),
    (r"DepthAnything", "ComfyUI-DepthAnythingV2"),
    (r"^(DWPreprocessor|AIO_|.*Preprocessor$)", "comfyui_controlnet_aux"),
    (r"^(Sam2|SAM2|DownloadAndLoadSAM2)", "ComfyUI-segment-anything-2"),
    (r"(KJ|KJv2)$|^Get|^Set|^Image(Concat|Pad|Resize)|Constant$|AddLabel|GrowMask", "ComfyUI-KJNodes"),
    (r"^(Unet|CLIP)Loader(GGUF)?|GGUF$", "ComfyUI-GGUF"),
    (r"^easy ", "ComfyUI-Easy-Use"),
    (r"^rgthree|\(rgthree\)$", "rgthree-comfy"),
)
# Nodes of the original pack's forks, and of its past, by name; the rest of theirs say whose they are.
OWN_NAMES = re.compile(
    r"WanVideo|MultiTalk|Wav2Vec|Fantasy|HuMo|Lynx|NLF|^Ovi|MTVCrafter|^LoadVQVAE$|^Mocha|ReCamMaster|^Whisper|"
    r"^(Landmarks|DrawArcFace|FaceMaskFromPose|DrawGaussianNoise|NormalizeAudioLoudness|CreateScheduleFloatList)|"
    r"^(ExtractStartFrames|Qwen|TextImageEncodeQwenVL|DummyComfyWanModel|WanMove_native)|^CreateCFGScheduleFloatList$"
)
OWN_PACKS = ("comfyui-wanvideowrapper", "kijai/comfyui-wanvideowrapper")
A_FORK = "a fork of the original pack"


def pack_of(node_type: str, stated: str) -> str:
    """The pack: what the workflow states, else what the name suggests, else "an unknown pack"."""
    if stated:
        return A_FORK if stated.lower() in OWN_PACKS else f"the pack '{stated}'"
    for pattern, name in PACKS:
        if re.search(pattern, node_type):
            return name
    return A_FORK if OWN_NAMES.search(node_type) else "an unknown pack"
