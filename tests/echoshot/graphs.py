"""The saved graph of EchoShot."""

import torch
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny

LORAS = (
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", "Wan2_1_self_forcing_dmd_1_3B_lora_rank_32_fp16",
    "WanVid/funreward/Wan2.1-Fun-1.3B-InP-MPS_reward_lora_comfy",
)  # fmt: skip


def fill(files):
    model = tiny.transformer(in_dim=16)
    model.save(files.diffusion / "EchoShot/Wan2_1-T2V-1-3B-EchoShot_fp16.safetensors", torch.float16)
    files.encoders()
    for name in LORAS:
        tiny.lora(model).save(files.models / f"loras/{name}.safetensors")


CASES = {
    "echoshot": GraphCase(
        graph="wanvideo_1_3B_EchoShot_example.json",
        fill=fill,
        edits=(
            "78.width=64", "78.height=64", "78.num_frames=9", "27.steps=2", "107.steps=2", "22.attention_mode=sdpa",
            "22.base_precision=fp32", "38.precision=fp32",
        ),
        # By shots, and by prompts that share out the frames.
        videos=(9, 9),
    )
}  # fmt: skip
