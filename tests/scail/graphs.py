"""The saved graph of SCAIL, with fixed outputs of the detectors and of the renderer of poses."""

import torch
from foreign_nodes import foreign
from saved_models import LIGHTX, save_clip, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.scail.extension import Scail


def rendered(nlf_poses, width, height, **_):
    poses = torch.rand(len(nlf_poses), height, width, 3, generator=torch.Generator().manual_seed(0))
    return poses, poses[..., 0]


NODES = {
    "DownloadAndLoadNLFModel": foreign(("NLFMODEL",), lambda: (None,)),
    "NLFPredict": foreign(("NLFPRED",), lambda images, **_: (images,)),
    "OnnxDetectionModelLoader": foreign(("POSEMODEL",), lambda: (None,)),
    "PoseDetectionVitPoseToDWPose": foreign(("DWPOSES",), lambda **_: (None,)),
    "RenderNLFPoses": foreign(("IMAGE", "MASK"), rendered),
}


def fill(files):
    model = tiny.transformer(in_dim=20, extensions=(Scail(channels=20), ClipImageExtension(clip_dim=files.clip_dim)))
    save_fp8(model, files.diffusion / "SCAIL/Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    files.encoders(vae_dim=4, clip=True)
    tiny.lora(model).save(files.models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    save_clip(files.inputs / "21_兔子舞改.mp4", frames=20)
    files.pictures("ComfyUI_02418_.png")


CASES = {
    "scail": GraphCase(
        graph="wanvideo_2_1_14B_SCAIL_pose_control_example_01.json",
        fill=fill,
        edits=(
            "203.value=64", "204.value=64", "130.frame_load_cap=9", "349.steps=2", "22.base_precision=fp32",
            "22.attention_mode=sdpa", "38.precision=fp32",
        ),
        nodes=NODES,
        muted=("WanVideoTorchCompileSettings",),
        # The rendered poses are a video, too.
        videos=(9, 9),
    )
}  # fmt: skip
