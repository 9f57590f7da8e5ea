"""The saved graph of MoCha, with a fixed subject."""

import torch
from foreign_nodes import foreign
from saved_models import LIGHTX, save_clip, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny


def subject(image, **_):
    mask = torch.zeros(image.shape[:3])
    mask[:, 16:48, 16:48] = 1
    return (mask,)


NODES = {
    "DownloadAndLoadSAM2Model": foreign(("SAM2MODEL",), lambda: (None,)),
    "Sam2Segmentation": foreign(("MASK",), subject),
    "PointsEditor": foreign(("STRING", "STRING", "BBOX", "MASK", "IMAGE"), lambda bg_image: ("", "", None, None, None)),
}


def fill(files):
    model = tiny.transformer(in_dim=16)
    name = "Wan2_1_mocha-14B-preview_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(model, files.diffusion / "mocha/MoCha" / name, scaled=True)
    tiny.lora(model).save(files.models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    files.encoders()
    save_clip(files.inputs / "Severance-Cut01.mp4", frames=5)
    files.pictures("oldman_upscaled.png")


CASES = {
    "mocha": GraphCase(
        graph="wanvideo_2_1_14B_MoCha_replace_subject_KJ_02.json",
        fill=fill,
        edits=(
            "245.width=64", "245.height=64", "314.steps=2", "311.attention_mode=sdpa", "311.base_precision=fp32",
            "308.precision=fp32",
        ),
        nodes=NODES,
        muted=("MaskPreview", "WanVideoTorchCompileSettings"),
        videos=(5,),
    )
}  # fmt: skip
