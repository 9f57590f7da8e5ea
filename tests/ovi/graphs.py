"""The saved graphs of Ovi: videos with sound."""

from dataclasses import replace

import torch
from system_graphs import GraphCase, beside
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.ovi.extension import Ovi
from wanvideo_wrapper.wanvideo.modules.vae import build_vae
from wanvideo_wrapper.wanvideo.modules.vae_keys import VaeLayout

VAE_2_2 = VaeLayout(
    base_dim=4, decoder_base_dim=4, z_dim=48, stages=(1, 2, 4, 4), res_blocks=1, temporal=(False, True, True),
    channels=12, nested=True,
)  # fmt: skip
EDITS = (
    "110.width=64", "110.height=64", "81.num_frames=9", "125.length=8", "80.steps=2", "12.attention_mode=sdpa",
    "12.base_precision=fp32", "87.precision=fp32", "89.precision=fp32", "93.blocks=1",
)  # fmt: skip


def fill(files):
    torch.manual_seed(3)
    ovi = tiny.transformer(in_dim=48, out_dim=48, extensions=(Ovi(channels=20, hidden=16, kernel=7),), layers=2)
    halves = [
        {k: v for k, v in ovi.tensors.items() if k.startswith("audio_model.") is wanted} for wanted in (False, True)
    ]
    for name, tensors in zip(("video", "audio"), halves, strict=True):
        replace(ovi, tensors=tensors).save(files.diffusion / f"Ovi/Wan_2_1_Ovi_{name}_model_bf16.safetensors")
    authors = {k if k.startswith("audio_model.") else f"video_model.{k}": v for k, v in ovi.tensors.items()}
    replace(ovi, tensors=authors).save(files.diffusion / "Ovi/model_960x960_10s.safetensors")
    vae = tiny.Tiny(tensors={k: v.detach() for k, v in build_vae(VAE_2_2).named_parameters()})
    for place in ("", "wanvideo/"):
        vae.save(files.models / f"vae/{place}Wan2_2_VAE_bf16.safetensors")
    sounds = beside(__file__, "sound_files")
    for place, kind in (("vae/", "fp32"), ("mmaudio/mmaudio/", "bf16")):
        sounds.vae_file().save(files.models / f"{place}mmaudio_vae_16k_{kind}.safetensors")
        sounds.vocoder_file().save(files.models / f"{place}mmaudio_vocoder_bigvgan_best_netG_{kind}.safetensors")
    files.encoders()
    files.pictures("oldman_upscaled.png", "6 (4).png")


CASES = {
    f"ovi{seconds}": GraphCase(
        graph=f"wanvideo_2_2_5B_Ovi_image_to_video_audio{seconds}_example_01.json",
        fill=fill,
        edits=EDITS,
        muted=("PreviewAudio", "WanVideoTorchCompileSettings"),
        videos=(9,),
        sound=8 * 2 * 256 / 16000,
    )
    for seconds in ("", "_10_seconds")
}
