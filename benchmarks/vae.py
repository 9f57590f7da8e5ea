"""Decoding and encoding with both Wan VAEs beside diffusers' own forward, in one run.

    python benchmarks/vae.py [--frames 81] [--width 832] [--height 480]

Weights are random, of the published sizes; bfloat16. Seconds are of the whole way, CPU tensor to CPU tensor: the median
of three, the two in turn. PSNR is of our bfloat16 against our float32, beside that of diffusers' bfloat16, on a small
clip. One JSON line a VAE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.frames import latent_frames
from wanvideo_wrapper.wanvideo.modules.vae import WanVAE, build_vae, channels_last
from wanvideo_wrapper.wanvideo.modules.vae_keys import VaeLayout

ROUNDS = 3
LAYOUTS = {
    "2.1": VaeLayout(
        base_dim=96, decoder_base_dim=96, z_dim=16, stages=(1, 2, 4, 4), res_blocks=2, temporal=(False, True, True),
        channels=3, nested=False,
    ),
    "2.2": VaeLayout(
        base_dim=160, decoder_base_dim=256, z_dim=48, stages=(1, 2, 4, 4), res_blocks=2, temporal=(False, True, True),
        channels=12, nested=True,
    ),
}  # fmt: skip


def ours(model: nn.Module, layout: VaeLayout) -> WanVAE:
    """Our forward of this model."""
    statistics_of = torch.zeros(layout.z_dim), torch.ones(layout.z_dim)
    return WanVAE(model, layout, statistics_of, dtype=model.dtype, host=StandaloneHost(device="cuda"))


def theirs(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """diffusers' decode and encode of this model, CPU tensor to CPU tensor."""

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return model.decode(latents[None].to("cuda", model.dtype)).sample[0].float().cpu()

    def encode(video: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode(video[None].to("cuda", model.dtype)).latent_dist.mean[0].float().cpu()

    return decode, encode


def measured(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Seconds and the peak of GPU memory in GiB over what the weights take."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = {}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        name: {"s": round(statistics.median(found), 3), "peak_gib": round(peaks[name], 2)}
        for name, found in seconds.items()
    }


def psnr(got: Tensor, want: Tensor) -> float:
    """Decibels over the range of `want`."""
    return round(20 * torch.log10((want.max() - want.min()) / (got - want).square().mean().sqrt()).item(), 1)


def quality(layout: VaeLayout) -> dict[str, float]:
    """PSNR of decoding in bfloat16, ours and diffusers', against our float32."""
    torch.manual_seed(0)
    model = build_vae(layout).cuda().eval().requires_grad_(False)
    latents = torch.randn(layout.z_dim, 3, 16, 24)
    want = ours(model, layout).decode(latents)
    half = model.bfloat16()
    channels_last(half)
    return {
        "psnr": psnr(ours(half, layout).decode(latents), want),
        "psnr_diffusers": psnr(theirs(half)[0](latents), want),
    }


def compared(layout: VaeLayout, frames: int, width: int, height: int) -> dict[str, object]:
    """Times, peaks and quality of one VAE."""
    torch.manual_seed(0)
    plain, fast = (build_vae(layout).bfloat16().cuda().eval().requires_grad_(False) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    channels_last(fast)
    vae, (decode, encode) = ours(fast, layout), theirs(plain)
    cells = height // layout.spatial_factor, width // layout.spatial_factor
    latents = torch.randn(layout.z_dim, latent_frames(frames), *cells)
    video = torch.rand(3, frames, height, width) * 2 - 1
    decoding = {"ours": lambda: vae.decode(latents, quiet=True), "diffusers": lambda: decode(latents)}
    encoding = {"ours": lambda: vae.encode(video, quiet=True), "diffusers": lambda: encode(video)}
    return {"decode": measured(decoding), "encode": measured(encoding), **quality(layout)}


def main() -> None:
    """Print one JSON line a VAE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("frames", 81), ("width", 832), ("height", 480)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(args)}
    for name, layout in LAYOUTS.items():
        result = compared(layout, args.frames, args.width, args.height)
        sys.stdout.write(json.dumps({"vae": name, **about, **result}) + "\n")


if __name__ == "__main__":
    main()
