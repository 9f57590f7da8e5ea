"""The saved graph of FantasyTalking runs headless to a video, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import torch
from fantasy_models import talking_module
from PIL import Image
from saved_models import GRAPHS, save_fp8
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

GRAPH = GRAPHS / "wanvideo_2_1_14B_I2V_FantasyTalking_example_01.json"
EDITS = (
    "74.width=64", "74.height=64", "75.value=9", "79.value=2", "WanVideoTeaCache.use_coefficients=false",
    "22.base_precision=fp32", "38.precision=fp32",
)  # fmt: skip


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    diffusion = models / "diffusion_models/WanVideo"
    save_fp8(tiny.image_to_video(), diffusion / "Wan2_1-I2V-14B-720P_fp8_e4m3fn.safetensors", scaled=False)
    talking_module().save(diffusion / "fantasytalking_fp16.safetensors", torch.float16)
    tiny.wav2vec().save(models / "transformers/facebook/wav2vec2-base-960h/model.safetensors", torch.float16)
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    inputs.mkdir()
    (inputs / "woman.wav").write_bytes((INPUT / "speech.wav").read_bytes())
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "woman.png")
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    (video,) = out.rglob("*.mp4")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 9
        assert container.streams.audio
