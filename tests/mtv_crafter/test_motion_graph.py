"""The saved graph of MTVCrafter runs headless to a video, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import tiny_motion
import torch
from PIL import Image
from saved_models import GRAPHS, save_clip, save_fp8
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.mtv_crafter.extension import MtvCrafter
from wanvideo_wrapper.mtv_crafter.nodes import DownloadAndLoadNLFModel

GRAPH = GRAPHS / "wanvideo_2_1_14B_MTV_Crafter_example_WIP.json"
MOTION = MtvCrafter(blocks=(0,))
EDITS = (
    "176.value=64", "177.value=64", "138.frame_load_cap=9", "WanVideoModelLoader.attention_mode=sdpa",
    "WanVideoSampler.steps=2", "169.width=64", "169.height=64",
)  # fmt: skip


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


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path, monkeypatch):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    whole = tiny.transformer(in_dim=36, extensions=(tiny.ClipImageExtension(clip_dim=tiny.CLIP_DIM), MOTION))
    own = {key: value for key, value in whole.tensors.items() if MOTION.owns(key)}
    base = tiny.Tiny(tensors={k: v for k, v in whole.tensors.items() if k not in own}, metadata=whole.metadata)
    diffusion = models / "diffusion_models/WanVideo"
    save_fp8(base, diffusion / "fp8_scaled_kj/I2V/Wan2_1-I2V-14B-MAGREF_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    tiny.Tiny(tensors=own).save(diffusion / "MTVCrafter/Wan2_1_MTV-Crafter_motion_adapter_bf16.safetensors")
    tiny_motion.save_tokenizer(models / "vae/wanvideo/MTV_Crafter_4DMoT_VQVAE_fp32.safetensors")
    tiny.lora(base).save(models / "loras/lightx2v_I2V_not_clamped_rank_64_fp16_00001_.safetensors")
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5_xxl_fp16.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    inputs.mkdir()
    save_clip(inputs / "MTV_crafter_example_pose_00001.mp4", frames=9)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "example.png")
    monkeypatch.setitem(NODE_CLASS_MAPPINGS, "DownloadAndLoadNLFModel", LoadsDetector)
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    for video in out.rglob("*.mp4"):
        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(container.streams.video[0])) == 9
    assert len(list(out.rglob("*.mp4"))) == 2, "the skeleton, and the result beside it"
