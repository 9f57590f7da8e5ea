"""The saved graphs of S2V run headless to a video, with tiny models under the file names that they use.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import pytest
import torch
from foreign_nodes import run_graph, save_talking_clip
from PIL import Image
from saved_models import GRAPHS, LIGHTX, save_fp8
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.s2v.extension import SpeechInjection

LAYERS, FEATURES = 3, 8
SIZES = SpeechInjection(layers=LAYERS, audio_dim=FEATURES, tokens=4, pose_dim=16)


def save_encoder(path):
    """A speech encoder of the large layout, with as many levels and channels as the tiny model reads."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=FEATURES, num_hidden_layers=LAYERS - 1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_bias=True,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    tiny.wav2vec_file(Wav2Vec2Model(config)).save(path, torch.float32)


SMALL = ("WanVideoSampler.steps=2", "22.base_precision=fp32", "22.attention_mode=sdpa", "38.precision=fp32")
# 33 frames are 2.06 seconds, of which three windows of 16 frames are made, or one of 33.
GRAPH_RUNS = {
    "wanvideo2_2_S2V_framepack_pose_testing.json": (
        "131.value=64", "132.value=64", "37.num_frames=33", "106.frame_load_cap=33", "116.frame_load_cap=33",
        "117.frame_window_size=16", "143.num_frames=33",
    ),
    "wanvideo2_2_S2V_context_window_testing.json": (
        "74.width=64", "74.height=64", "37.num_frames=33", "101.frame_window_size=33", "83.context_frames=17",
        "83.context_overlap=8",
    ),
}  # fmt: skip
# Compiling takes longer than such a small model runs.
COMPILING = ("WanVideoTorchCompileSettings",)
LENGTHS = dict(zip(GRAPH_RUNS, (33, 30), strict=True))


@pytest.mark.parametrize("name", GRAPH_RUNS)
def test_graph_runs_to_a_video(name, tmp_path, monkeypatch):
    graph = GRAPHS / name
    if not graph.is_file():
        pytest.skip(f"no {graph} (set WANVIDEO_GRAPHS)")
    models, inputs = tmp_path / "models", tmp_path / "input"
    model = tiny.transformer(in_dim=16, extensions=(SIZES,))
    file = models / "diffusion_models/WanVideo/S2V/Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(model, file, scaled=True)
    tiny.vae(base_dim=4).save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    save_encoder(models / "audio_encoders/wav2vec_xlsr_53_english_fp32.safetensors")
    tiny.lora(tiny.transformer(in_dim=16)).save(models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    for clip in ("weightoftheworld2.mp4", "weight-world-bones_00003-audio.mp4"):
        save_talking_clip(inputs / clip, 40)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "2b.jpg")
    videos = run_graph(graph, tmp_path, monkeypatch, nodes={}, edits=(*SMALL, *GRAPH_RUNS[name]), muted=COMPILING)
    assert LENGTHS[name] in videos.values()
