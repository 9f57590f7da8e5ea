"""The saved graphs of Ovi run headless to a video with sound, with tiny models under the file names that they use.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from saved_models import GRAPHS
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.ovi.extension import Ovi
from wanvideo_wrapper.wanvideo.modules.vae import build_vae
from wanvideo_wrapper.wanvideo.modules.vae_keys import VaeLayout

spec = importlib.util.spec_from_file_location("ovi_graph_sounds", Path(__file__).with_name("sound_files.py"))
sounds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sounds)

VAE_2_2 = VaeLayout(
    base_dim=4, decoder_base_dim=4, z_dim=48, stages=(1, 2, 4, 4), res_blocks=1, temporal=(False, True, True),
    channels=12, nested=True,
)  # fmt: skip
EDITS = (
    "110.width=64", "110.height=64", "81.num_frames=9", "125.length=8", "80.steps=2", "12.attention_mode=sdpa",
    "12.base_precision=fp32", "87.precision=fp32", "89.precision=fp32", "93.blocks=1",
)  # fmt: skip
FIVE = "wanvideo_2_2_5B_Ovi_image_to_video_audio_example_01.json"
TEN = "wanvideo_2_2_5B_Ovi_image_to_video_audio_10_seconds_example_01.json"


def fill(models, inputs):
    torch.manual_seed(3)
    ovi = tiny.transformer(in_dim=48, out_dim=48, extensions=(Ovi(channels=20, hidden=16, kernel=7),), layers=2)
    halves = [
        {k: v for k, v in ovi.tensors.items() if k.startswith("audio_model.") is wanted} for wanted in (False, True)
    ]
    folder = models / "diffusion_models/WanVideo/Ovi"
    for name, tensors in zip(("video", "audio"), halves, strict=True):
        replace(ovi, tensors=tensors).save(folder / f"Wan_2_1_Ovi_{name}_model_bf16.safetensors")
    authors = {k if k.startswith("audio_model.") else f"video_model.{k}": v for k, v in ovi.tensors.items()}
    replace(ovi, tensors=authors).save(folder / "model_960x960_10s.safetensors")
    vae = build_vae(VAE_2_2)
    tiny.Tiny(tensors={k: v.detach() for k, v in vae.named_parameters()}).save(
        models / "vae/Wan2_2_VAE_bf16.safetensors"
    )
    (models / "vae/wanvideo").mkdir()
    (models / "vae/wanvideo/Wan2_2_VAE_bf16.safetensors").symlink_to(models / "vae/Wan2_2_VAE_bf16.safetensors")
    for place, kind in (("vae/", "fp32"), ("mmaudio/mmaudio/", "bf16")):
        sounds.vae_file().save(models / f"{place}mmaudio_vae_16k_{kind}.safetensors")
        sounds.vocoder_file().save(models / f"{place}mmaudio_vocoder_bigvgan_best_netG_{kind}.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    inputs.mkdir()
    with Image.open(INPUT / "portrait.png") as portrait:
        for name in ("oldman_upscaled.png", "6 (4).png"):
            portrait.save(inputs / name)


@pytest.mark.parametrize("name", [FIVE, TEN])
@pytest.mark.skipif(not (GRAPHS / FIVE).is_file(), reason=f"no {GRAPHS / FIVE} (set WANVIDEO_GRAPHS)")
def test_graph_runs_to_a_video_with_sound(name, tmp_path):
    models, inputs, out = tmp_path / "models", tmp_path / "input", tmp_path / "output"
    fill(models, inputs)
    arguments = ["run", GRAPHS / name, "--models", models, "--input", inputs, "--out", out, "--device", "cpu"]
    arguments += [part for edit in EDITS for part in ("--set", edit)]
    arguments += ["--mute", "PreviewAudio", "--mute", "WanVideoTorchCompileSettings"]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    (video,) = out.rglob("*.mp4")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 9
    with av.open(str(video)) as container:
        samples = sum(frame.samples for frame in container.decode(container.streams.audio[0]))
        rate = container.streams.audio[0].rate
    assert samples / rate == pytest.approx(8 * 2 * 256 / 16000, abs=0.15)
