"""The saved graph of One-to-All, with fixed outputs of its pose detector."""

import torch
from foreign_nodes import foreign, save_talking_clip
from saved_models import LIGHTX, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.one_to_all.extension import OneToAll

SYSTEM = OneToAll(control_layers=1, reference_layers=1, channels=32, pose_dim=128)
# Subgraphs that each make four frames more.
PARTS = (263, 297, 311)


def detected(images, ref_image, **_):
    """Poses, the reference's pose, the reference and its mask."""
    mask = torch.zeros(1, *ref_image.shape[1:3])
    mask[:, :16] = 1
    return images, images[:1], ref_image, mask


def fill(files):
    model = tiny.transformer(in_dim=16, extensions=(SYSTEM,))
    save_fp8(model, files.diffusion / "OneToAll/Wan21-OneToAllAnimation_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    files.encoders(vae_dim=4)
    lora = tiny.lora(tiny.transformer(in_dim=16))
    lora.save(files.models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    save_talking_clip(files.inputs / "vid.mp4", 22)
    files.pictures("pasted/image (1035).png")


CASES = {
    "one_to_all": GraphCase(
        graph="wanvideo_2_1_14B_OneToAllAnimation_pose_control_example_01.json",
        fill=fill,
        edits=(
            "203.value=64", "204.value=64", "WanVideoEmptyEmbeds.num_frames=9", "GetImageRangeFromBatch.num_frames=9",
            "130.frame_load_cap=21", "27.steps=2", "231.steps=2", "22.base_precision=fp32", "22.attention_mode=sdpa",
            "38.precision=fp32", *(f"{part}:261.window_size=9" for part in PARTS),
            *(f"{part}:248.steps=2" for part in PARTS),
        ),
        nodes={
            "OnnxDetectionModelLoader": foreign(("POSEMODEL",), lambda: (None,)),
            "PoseDetectionOneToAllAnimation": foreign(("IMAGE", "IMAGE", "IMAGE", "MASK"), detected),
        },
        muted=("WanVideoTorchCompileSettings",),
        # The poses are a video, too.
        videos=(9, 13, 17, 21, 21),
    )
}  # fmt: skip
