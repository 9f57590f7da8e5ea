"""The saved graph of Lynx runs headless to a video, with tiny models under the file names that it uses.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
import tiny_faces
from PIL import Image
from saved_models import GRAPHS, LIGHTX, save_fp8
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.lynx import nodes
from wanvideo_wrapper.lynx.extension import Lynx
from wanvideo_wrapper.lynx.faces import TEMPLATE

GRAPH = GRAPHS / "wanvideo_2_1_14B_T2V_14B_lynx_example_01.json"
LYNX = Lynx(ip_blocks=(0, 2), context_dim=32, bias=False, ref_blocks=(0, 1, 2))
EDITS = (
    "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=5",
    "WanVideoModelLoader.attention_mode=sdpa", "WanVideoSampler.steps=2", "WanVideoLoraSelectMulti.lora_1=none",
)  # fmt: skip
MUTED = ("37",)


@pytest.mark.skipif(not GRAPH.is_file(), reason=f"no {GRAPH} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video(tmp_path, monkeypatch):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    whole = tiny.transformer(in_dim=16, extensions=(LYNX,))
    parts = {"ip": {}, "ref": {}, "base": {}}
    for key, value in whole.tensors.items():
        parts["ip" if "ip_adapter" in key else "ref" if "ref_adapter" in key else "base"][key] = value
    base = tiny.Tiny(tensors=parts["base"], metadata=whole.metadata)
    diffusion = models / "diffusion_models/WanVideo"
    save_fp8(base, diffusion / "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    tiny.Tiny(tensors=parts["ref"]).save(diffusion / "lynx/Wan2_1-T2V-Lynx_full_ref_layers_fp16.safetensors")
    tiny.Tiny(tensors=parts["ip"]).save(diffusion / "lynx/Wan2_1-T2V-Lynx_lite_ip_layers_fp16.safetensors")
    tiny_faces.save_resampler(diffusion / "lynx/lynx_lite_resampler_fp32.safetensors", LYNX.context_dim)
    tiny_faces.save_arcface(models / "clip_vision")
    tiny.lora(base).save(models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    inputs.mkdir()
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "oldman_upscaled.png")
    # In the place of the detector of another package.
    monkeypatch.setattr(nodes, "landmarks_of", lambda picture: TEMPLATE)
    arguments = ["run", GRAPH, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    arguments += [part for node in MUTED for part in ("--mute", node)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    (video,) = out.rglob("*.mp4")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 5
