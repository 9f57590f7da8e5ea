"""Tiny files of the sound's VAE and vocoder under published names."""

import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.ovi.mmaudio import SpectrumVae, VaeSizes
from wanvideo_wrapper.ovi.vocoder import BigVgan, VocoderSizes

VAE = VaeSizes(width=8, bands=80, latents=20)
VOCODER = VocoderSizes(bands=80, width=64, steps=(8, 8, 4, 4, 4, 4), units=(3, 7))


def random_state(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) * 0.5 for k, v in model.state_dict().items()}


def vae_file(seed=1):
    state = random_state(SpectrumVae(VAE), seed)
    state["data_std"] = state["data_std"].abs() + 0.5
    return tiny.Tiny(tensors=state)


def vocoder_file(seed=2, old=False):
    state = random_state(BigVgan(VOCODER), seed)
    state = {k: v.abs() * 0.3 if k.endswith("original0") else v for k, v in state.items()}
    if old:
        for new, name in (
            ("parametrizations.weight.original0", "weight_g"),
            ("parametrizations.weight.original1", "weight_v"),
        ):
            state = {k.replace(new, name): v for k, v in state.items()}
    return tiny.Tiny(tensors=state)
