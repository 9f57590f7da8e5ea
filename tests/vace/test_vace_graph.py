"""The saved graph of VACE runs headless to a video, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import torch
from PIL import Image
from saved_models import GRAPHS, save_clip
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.vace.extension import VaceExtension

GRAPH = GRAPHS / "wanvideo_1_3B_VACE_examples_03.json"
VACE = VaceExtension(blocks=2)
EDITS = (
    "229.width=64", "229.height=64", "172.steps=2", "22.base_precision=fp32", "38.precision=fp32",
    "147.use_coefficients=false", "WanVideoSLG.blocks=1",
)  # fmt: skip
# Depth maps, padding, labels and previews of masks are of other packs.
BYPASSED = ("DepthAnything_V2", "AddLabel", "ImagePadKJ")
MUTED = ("DownloadAndLoadDepthAnythingV2Model", "MaskPreview", "EmptyImage")


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    whole = tiny.transformer(in_dim=16, extensions=(VACE,)).tensors
    module = {key: value for key, value in whole.items() if VACE.owns(key)}
    base = {key: value for key, value in whole.items() if key not in module}
    diffusion = models / "diffusion_models/WanVideo"
    tiny.Tiny(tensors=base, metadata={"wanvideo.num_heads": "2"}).save(
        diffusion / "wan2.1_t2v_1.3B_fp16.safetensors", torch.float16
    )
    tiny.Tiny(tensors=module).save(diffusion / "Wan2_1-VACE_module_1_3B_bf16.safetensors")
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    inputs.mkdir()
    save_clip(inputs / "wolf_interpolated.mp4", frames=5)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "hunhyuanwolf.png")
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    arguments += [part for node in BYPASSED for part in ("--bypass", node)]
    arguments += [part for node in MUTED for part in ("--mute", node)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    videos = list(out.rglob("*.mp4"))
    assert len(videos) == 2, "the control video, and the result beside its inputs"
    for video in videos:
        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(container.streams.video[0])) == 5
