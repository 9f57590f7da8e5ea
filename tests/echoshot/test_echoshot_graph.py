"""The saved graph of EchoShot runs headless, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import torch
from saved_models import GRAPHS
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

GRAPH = GRAPHS / "wanvideo_1_3B_EchoShot_example.json"
EDITS = (
    "78.width=64", "78.height=64", "78.num_frames=9", "27.steps=2", "107.steps=2", "22.attention_mode=sdpa",
    "22.base_precision=fp32", "38.precision=fp32",
)  # fmt: skip
LORAS = (
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", "Wan2_1_self_forcing_dmd_1_3B_lora_rank_32_fp16",
    "WanVid/funreward/Wan2.1-Fun-1.3B-InP-MPS_reward_lora_comfy",
)  # fmt: skip


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path):
    models, out = tmp_path / "models", tmp_path / "output"
    model = tiny.transformer(in_dim=16)
    model.save(models / "diffusion_models/WanVideo/EchoShot/Wan2_1-T2V-1-3B-EchoShot_fp16.safetensors", torch.float16)
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    for name in LORAS:
        tiny.lora(model).save(models / f"loras/{name}.safetensors")
    arguments = ["run", GRAPH, "--models", models, "--input", tmp_path, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    lengths = []
    for video in sorted(out.rglob("*.mp4")):
        with av.open(str(video)) as container:
            lengths.append(sum(1 for _ in container.decode(container.streams.video[0])))
    assert lengths == [9, 9], "by shots, and by prompts that share out the frames"
