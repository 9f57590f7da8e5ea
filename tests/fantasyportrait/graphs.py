"""The saved graph of FantasyPortrait, with a detector of fixed answers."""

import torch
from fantasy_models import fixed_onnxruntime, name_detector, portrait_module
from saved_models import LIGHTX, save_clip, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny


def fill(files):
    i2v = tiny.image_to_video(clip_dim=files.clip_dim)
    base = "fp8_scaled_kj/I2V/Wan2_1-I2V-14B-720p_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(i2v, files.diffusion / base, scaled=True)
    module = files.diffusion / "FantasyPortrait/Wan2_1_FantasyPortrait_fp16.safetensors"
    portrait_module().save(module, torch.float16)
    files.encoders(clip=True)
    tiny.lora(i2v).save(files.models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    name_detector(files.models)
    save_clip(files.inputs / "jgz.mp4", frames=10)
    files.pictures("pasted/image (970).png")


CASES = {
    "fantasyportrait": GraphCase(
        graph="wanvideo_2_1_14B_I2V_FantasyPortrait_example_01.json",
        fill=fill,
        # Smaller faces than 96 pixels are not followed.
        edits=(
            "169.value=128", "170.value=128", "174.value=9", "149.steps=2", "140.attention_mode=sdpa",
            "140.base_precision=fp32", "152.precision=fp32",
        ),
        # Compiling takes longer than all else here.
        muted=("WanVideoTorchCompileSettings",),
        modules={"onnxruntime": fixed_onnxruntime},
        # The landmarks, and the result beside its inputs.
        videos=(9, 9),
    )
}  # fmt: skip
