"""The saved graph of FantasyTalking."""

import torch
from fantasy_models import talking_module
from saved_models import save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import INPUT, tiny


def fill(files):
    model = tiny.image_to_video(clip_dim=files.clip_dim)
    save_fp8(model, files.diffusion / "Wan2_1-I2V-14B-720P_fp8_e4m3fn.safetensors", scaled=False)
    talking_module().save(files.diffusion / "fantasytalking_fp16.safetensors", torch.float16)
    encoder = files.models / "transformers/facebook/wav2vec2-base-960h/model.safetensors"
    tiny.wav2vec().save(encoder, torch.float16)
    files.encoders(clip=True)
    (files.inputs / "woman.wav").write_bytes((INPUT / "speech.wav").read_bytes())
    files.pictures("woman.png")


CASES = {
    "fantasytalking": GraphCase(
        graph="wanvideo_2_1_14B_I2V_FantasyTalking_example_01.json",
        fill=fill,
        edits=(
            "74.width=64", "74.height=64", "75.value=9", "79.value=2", "WanVideoTeaCache.use_coefficients=false",
            "22.base_precision=fp32", "38.precision=fp32",
        ),
        videos=(9,),
        sound=0.4,
    )
}  # fmt: skip
