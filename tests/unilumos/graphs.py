"""The saved graph of UniLumos, with a fixed subject."""

import torch
from foreign_nodes import foreign
from saved_models import save_clip
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny


def without_background(image, **_):
    mask = torch.zeros(image.shape[:3])
    mask[:, 16:48, 16:48] = 1
    return image, mask


NODES = {
    "TransparentBGSession+": foreign(("REMBG_SESSION",), lambda: (None,)),
    "ImageRemoveBackground+": foreign(("IMAGE", "MASK"), without_background),
    "DrawGaussianNoiseOnImage": foreign(
        ("IMAGE",), lambda image, mask: (image * (1 - mask[..., None]) + mask[..., None] / 2,)
    ),
}


def fill(files):
    tiny.transformer(in_dim=48).save(files.diffusion / "UniLumos/Wan2_1_UniLumos_1_3B_bf16.safetensors")
    tiny.lora(tiny.transformer(in_dim=48)).save(
        files.models / "loras/Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors"
    )
    files.encoders()
    for name in ("example_3.mp4", "bg_video_5 (1).mp4"):
        save_clip(files.inputs / name, frames=9)


CASES = {
    "unilumos": GraphCase(
        graph="wanvideo_1_3B_UniLumos_relight_example_01.json",
        fill=fill,
        edits=(
            "116.width=64", "116.height=64", "27.steps=2", "22.attention_mode=sdpa", "22.base_precision=fp32",
            "140.precision=fp32",
        ),
        nodes=NODES,
        videos=(9,),
    )
}  # fmt: skip
