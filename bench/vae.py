"""Decoding and encoding with the Wan VAE of a model, beside diffusers' own forward.

Weights are random, of the published sizes, in bfloat16 (on a CPU, which lacks fast ones, in float32). A time is of the
whole way, CPU tensor to CPU tensor. dB: PSNR of bfloat16 against our float32, on a small clip.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..host import Host
from ..wanvideo.modules.vae import WanVAE, build_vae, channels_last
from ..wanvideo.modules.vae_keys import VaeLayout
from .clock import peak_above, seconds
from .random_model import DTYPE, Case
from .report import Row

ROUNDS = 3
VAE_2_1 = VaeLayout(
    base_dim=96, decoder_base_dim=96, z_dim=16, stages=(1, 2, 4, 4), res_blocks=2, temporal=(False, True, True),
    channels=3, nested=False,
)  # fmt: skip
VAE_2_2 = VaeLayout(
    base_dim=160, decoder_base_dim=256, z_dim=48, stages=(1, 2, 4, 4), res_blocks=2, temporal=(False, True, True),
    channels=12, nested=True,
)  # fmt: skip
VAES = {
    "5B": VAE_2_2,
    "tiny": dataclasses.replace(VAE_2_1, base_dim=16, decoder_base_dim=16),
}

Half = Callable[[Tensor], Tensor]


def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """This project and diffusers: seconds, GiB above the weights at the peak, dB."""
    layout = VAES.get(case.model, VAE_2_1)
    torch.manual_seed(0)
    plain, fast = (_model(layout, host).to(_dtype(host)) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    channels_last(fast)
    vae, (decode, encode) = _ours(fast, layout, host), _theirs(plain, host)
    width, height, frames = case.size
    latents, video = torch.randn(layout.z_dim, *case.latent_size), torch.rand(3, frames, height, width) * 2 - 1
    decoding = {"this project": lambda: vae.decode(latents, quiet=True), "diffusers": lambda: decode(latents)}
    encoding = {"this project": lambda: vae.encode(video, quiet=True), "diffusers": lambda: encode(video)}
    values: dict[str, dict[str, float]] = {name: {} for name in decoding}
    for what, calls in (("decode", decoding), ("encode", encoding)):
        times = seconds(calls, host.device(), ROUNDS)
        for name, call in calls.items():
            values[name][f"s to {what}"] = times[name]
            if host.device().type == "cuda":
                values[name][f"GiB to {what}"] = peak_above(call, host.device())
    if _dtype(host) is DTYPE:
        for name, decibels in _quality(layout, host).items():
            values[name]["dB"] = decibels
    return [Row(name, found) for name, found in values.items()]


def random_vae(case: Case, host: Host) -> WanVAE:
    """The VAE of the case's model."""
    layout = VAES.get(case.model, VAE_2_1)
    model = _model(layout, host).to(_dtype(host))
    channels_last(model)
    return _ours(model, layout, host)


def _dtype(host: Host) -> torch.dtype:
    return DTYPE if host.device().type == "cuda" else torch.float32


def _model(layout: VaeLayout, host: Host) -> nn.Module:
    return build_vae(layout).to(host.device()).eval().requires_grad_(False)


def _ours(model: nn.Module, layout: VaeLayout, host: Host) -> WanVAE:
    statistics = torch.zeros(layout.z_dim), torch.ones(layout.z_dim)
    return WanVAE(model, layout, statistics, dtype=model.dtype, host=host)


def _theirs(model: nn.Module, host: Host) -> tuple[Half, Half]:
    device = host.device()

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents[None].to(device, model.dtype)).sample[0].float().cpu()

    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        return model.encode(video[None].to(device, model.dtype)).latent_dist.mean[0].float().cpu()

    return decode, encode


def _quality(layout: VaeLayout, host: Host) -> dict[str, float]:
    torch.manual_seed(0)
    model = _model(layout, host)
    latents = torch.randn(layout.z_dim, 2, 8, 8)
    want = _ours(model, layout, host).decode(latents, quiet=True)
    half = model.to(DTYPE)
    theirs = _theirs(half, host)[0](latents)
    channels_last(half)
    return {"this project": _psnr(_ours(half, layout, host).decode(latents, quiet=True), want),
            "diffusers": _psnr(theirs, want)}  # fmt: skip


def _psnr(got: Tensor, want: Tensor) -> float:
    # diffusers cuts off what no picture has.
    got, want = got.clamp(-1, 1), want.clamp(-1, 1)
    return 20 * torch.log10((want.max() - want.min()) / (got - want).square().mean().sqrt()).item()
