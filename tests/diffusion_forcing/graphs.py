"""The saved graph that extends a video twice."""

import torch
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.diffusion_forcing.extension import FrameRateEmbedding


def fill(files):
    model = tiny.transformer(in_dim=16, extensions=(FrameRateEmbedding(),))
    model.save(files.diffusion / "Skyreels/Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors", torch.float32)
    files.encoders()
    encoder = files.models / "text_encoders/umt5_xxl_fp16.safetensors"
    tiny.text_encoder(wan_names=False).save(encoder, torch.float16)
    files.pictures("oldman.jpg")


CASES = {
    "diffusion_forcing": GraphCase(
        graph="wanvideo_2_1_14B_skyreels_diffusion_forcing_extension_example_01.json",
        fill=fill,
        edits=(
            "66.width=32", "66.height=32", "82.num_frames=9", "124.num_frames=9", "152.num_frames=9", "127.value=5",
            "103.steps=2", "104.steps=2", "165.steps=2", "142.blocks=1", "22.base_precision=fp32",
            "38.precision=fp32", "106.use_coefficients=false",
        ),
        # The first video, its two extensions, and all of them joined.
        videos=(9, 9, 9, 17),
    )
}  # fmt: skip
