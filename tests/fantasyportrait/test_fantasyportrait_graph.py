"""The saved graph of FantasyPortrait runs headless to its videos, with tiny models and a detector of fixed answers.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import torch
from fantasy_models import portrait_module, stand_in_detector
from PIL import Image
from saved_models import GRAPHS, LIGHTX, save_clip, save_fp8
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

GRAPH = GRAPHS / "wanvideo_2_1_14B_I2V_FantasyPortrait_example_01.json"
# Smaller faces than 96 pixels are not followed.
EDITS = ("169.value=128", "170.value=128", "174.value=9", "149.steps=2", "140.attention_mode=sdpa",
         "140.base_precision=fp32", "152.precision=fp32")  # fmt: skip
# Compiling takes longer than all else here.
MUTED = ("WanVideoTorchCompileSettings",)


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_videos(tmp_path, monkeypatch):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    diffusion, i2v = models / "diffusion_models/WanVideo", tiny.image_to_video()
    save_fp8(i2v, diffusion / "fp8_scaled_kj/I2V/Wan2_1-I2V-14B-720p_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    portrait_module().save(diffusion / "FantasyPortrait/Wan2_1_FantasyPortrait_fp16.safetensors", torch.float16)
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    tiny.lora(i2v).save(models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    stand_in_detector(monkeypatch, models)
    (inputs / "pasted").mkdir(parents=True)
    save_clip(inputs / "jgz.mp4", frames=10)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "pasted/image (970).png")
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    arguments += [part for node in MUTED for part in ("--mute", node)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    videos = list(out.rglob("*.mp4"))
    assert len(videos) == 2, "the landmarks, and the result beside its inputs"
    for video in videos:
        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(container.streams.video[0])) == 9
