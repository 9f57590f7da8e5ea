"""The saved graph of Stand-In runs headless to a video, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
from PIL import Image
from saved_models import GRAPHS, LIGHTX, save_fp8
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.stand_in.extension import StandIn

GRAPH = GRAPHS / "wanvideo_2_1_14B_Stand-In_reference_example_01.json"
EDITS = (
    "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=5",
    "109.width=64", "109.height=64", "68.width=64", "68.height=64", "WanVideoModelLoader.attention_mode=sdpa",
    "WanVideoSampler.steps=2",
)  # fmt: skip
# The face is cut out by other packs: a picture in its place.
BYPASSED = ("108",)
MUTED = ("136", "153")


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    whole = tiny.transformer(in_dim=16, extensions=(StandIn(rank=16),))
    pairs = {key: value for key, value in whole.tensors.items() if "_loras." in key}
    base = tiny.Tiny(tensors={k: v for k, v in whole.tensors.items() if k not in pairs}, metadata=whole.metadata)
    diffusion = models / "diffusion_models/WanVideo"
    save_fp8(base, diffusion / "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    tiny.Tiny(tensors=pairs).save(
        models / "loras/WanVideo/Stand-In/Stand-In_wan2.1_T2V_14B_ver1.0.safetensors"
    )
    tiny.lora(base).save(models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    (inputs / "pasted").mkdir(parents=True)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "pasted/image (970).png")
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    arguments += [part for node in BYPASSED for part in ("--bypass", node)]
    arguments += [part for node in MUTED for part in ("--mute", node)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    (video,) = out.rglob("*.mp4")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 5
