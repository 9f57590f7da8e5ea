"""The saved graph of MTVCrafter, with a pose detector of fixed answers."""

import tiny_motion
import torch
from saved_models import save_clip, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.mtv_crafter.extension import MtvCrafter
from wanvideo_wrapper.mtv_crafter.nodes import DownloadAndLoadNLFModel

MOTION = MtvCrafter(blocks=(0,))


class Detector:
    """Two people in every frame."""

    def detect_smpl_batched(self, images):
        poses = tiny_motion.poses(len(images))["joints3d_nonparam"][0]
        return {"joints3d_nonparam": poses, "boxes": [torch.zeros(0, 5)] * len(images)}


class LoadsDetector(DownloadAndLoadNLFModel):
    """In the place of a pack that runs NLF."""

    @classmethod
    def VALIDATE_INPUTS(cls, input_types=None):
        return True

    def loadmodel(self, url, warmup=True):
        return (Detector(),)


def fill(files):
    clip = tiny.ClipImageExtension(clip_dim=files.clip_dim)
    whole = tiny.transformer(in_dim=36, extensions=(clip, MOTION))
    own = {key: value for key, value in whole.tensors.items() if MOTION.owns(key)}
    base = tiny.Tiny(tensors={k: v for k, v in whole.tensors.items() if k not in own}, metadata=whole.metadata)
    name = "fp8_scaled_kj/I2V/Wan2_1-I2V-14B-MAGREF_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(base, files.diffusion / name, scaled=True)
    tiny.Tiny(tensors=own).save(files.diffusion / "MTVCrafter/Wan2_1_MTV-Crafter_motion_adapter_bf16.safetensors")
    files.encoders(clip=True, text="umt5_xxl_fp16")
    tiny_motion.save_tokenizer(files.models / "vae/wanvideo/MTV_Crafter_4DMoT_VQVAE_fp32.safetensors")
    tiny.lora(base).save(files.models / "loras/lightx2v_I2V_not_clamped_rank_64_fp16_00001_.safetensors")
    save_clip(files.inputs / "MTV_crafter_example_pose_00001.mp4", frames=9)
    files.pictures("example.png")


CASES = {
    "mtv_crafter": GraphCase(
        graph="wanvideo_2_1_14B_MTV_Crafter_example_WIP.json",
        fill=fill,
        edits=(
            "176.value=64", "177.value=64", "138.frame_load_cap=9", "WanVideoModelLoader.attention_mode=sdpa",
            "WanVideoSampler.steps=2", "169.width=64", "169.height=64",
        ),
        nodes={"DownloadAndLoadNLFModel": LoadsDetector},
        # The skeleton, and the result beside it.
        videos=(9, 9),
    )
}  # fmt: skip
