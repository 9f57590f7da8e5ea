"""The saved graph that extends a video twice runs headless, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import torch
from PIL import Image
from saved_models import GRAPHS
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.diffusion_forcing.extension import FrameRateEmbedding
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

GRAPH = GRAPHS / "wanvideo_2_1_14B_skyreels_diffusion_forcing_extension_example_01.json"
EDITS = (
    "66.width=32", "66.height=32", "82.num_frames=9", "124.num_frames=9", "152.num_frames=9", "127.value=5",
    "103.steps=2", "104.steps=2", "165.steps=2", "142.blocks=1", "22.base_precision=fp32", "38.precision=fp32",
    "106.use_coefficients=false",
)  # fmt: skip


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    model = tiny.transformer(in_dim=16, extensions=(FrameRateEmbedding(),))
    name = "Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors"
    model.save(models / "diffusion_models/WanVideo/Skyreels" / name, torch.float32)
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder(wan_names=False).save(models / "text_encoders/umt5_xxl_fp16.safetensors", torch.float16)
    inputs.mkdir()
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "oldman.jpg")
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
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
    assert sorted(lengths) == [9, 9, 9, 17], "the first video, its two extensions, and all of them joined"
