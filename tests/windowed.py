"""Context windows as the sampler runs them, and the sum of what their frames give alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.windows import ContextOptions, WindowedDenoiser

CPU = torch.device("cpu")
# What the first frame of a window counts that the window before it has, too.
LEAST = 1e-4


def denoisers(model: WanModel, cfg: float = 1.0, *, batched: bool = False) -> Callable[..., Denoiser]:
    """Makes the denoiser of given conditions."""

    def make(conditions: Conditions, memories: object = None) -> Denoiser:
        guidance = Guidance(cfg=(cfg,), payloads=conditions.payloads, batched=batched)
        return Denoiser(model, conditions, guidance=guidance, device=CPU, dtype=torch.float32)

    return make


def windowed(conditions: Conditions, make: Callable[..., Denoiser], *, size: int, leading: int = 0) -> WindowedDenoiser:
    """Windows of so many pixel frames that share one latent frame, or none where each has only one."""
    return WindowedDenoiser(
        conditions, options=ContextOptions(schedule="static_standard", size=size, overlap=4 if size > 1 else 0),
        texts=(conditions.positive,), references=(leading, 0), device=CPU, make=make, memories=lambda: None, model=None,
    )  # fmt: skip


def blended(parts: Sequence[tuple[Sequence[int], Sequence[float], Tensor]], frames: int) -> Tensor:
    """Velocities [C, n, H, W] of windows, at their places and by how much each frame counts."""
    total, weight = 0.0, 0.0
    for places, shares, velocity in parts:
        at = torch.zeros(frames, len(places))
        at[list(places), range(len(places))] = torch.tensor(shares)
        total = total + torch.einsum("fn,cnhw->cfhw", at, velocity)
        weight = weight + at.sum(1)[:, None, None]
    return total / weight
