"""A whole video at the model's full depth: the steps of the sampler, and the decoding of what they made.

What comes before the second step is told apart: moving weights, and what the first step takes above a later one, which
is making kernels and graphs. A second run of the command finds on disk what Triton and torch.compile keep there.

A talking video with --speakers. Prompt and picture are random numbers, which need no encoder; --encoders runs UMT5-XXL,
CLIP and the VAE's encoder first, whose results are not used. The whole model is drawn first: 14B takes a minute and 28
GB of main memory, UMT5-XXL 11 GB more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from ..host import Host, Managed, StandaloneHost
from ..wanvideo.block_swap import BlockSwapArgs
from ..wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from ..wanvideo.sampling import sample
from ..wanvideo.schedulers import ScheduleSpec, make_schedule
from .clock import wait_for
from .encoders import calls
from .random_model import Case, inputs_of, load
from .report import Row
from .vae import random_vae

GIB = 2**30


def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """The first step, the later ones, decoding and all together."""
    if options.steps < 2:
        raise ValueError(f"--steps must be at least 2, not {options.steps}: the first is told by itself.")
    device, clock = host.device(), StepHost(host.device())
    if options.limit is not None:
        _limit(options.limit, device)
    swap = None if options.swap is None else BlockSwapArgs(blocks_to_swap=options.swap)
    model = load(case, case.config.num_layers, clock, swap)
    moving = TimedMoves(model.managed)
    model = replace(model, managed=moving)
    vae = random_vae(case, clock)
    encoding = calls(case, clock) if options.encoders else {}
    if encoding:
        width, height, frames = case.size
        video = torch.rand(3, frames, height, width) * 2 - 1
        encoding["encoding the video's frames"] = lambda: vae.encode(video, quiet=True)
    inputs = inputs_of(case, device)
    request = SampleRequest(
        model=model,
        text=TextEmbeds(positive=inputs.text),
        image=ImageEmbeds(latent_shape=tuple(inputs.latents.shape[1:]), num_frames=case.size[2]),
        schedule=make_schedule(ScheduleSpec(name="unipc", steps=options.steps, shift=5.0)),
        cfg=1.0,
        seed=0,
        payloads=inputs.payloads,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    encoded = {name: _seconds(call) for name, call in encoding.items()}
    start = time.perf_counter()
    latents = sample(request, clock)[0]["samples"]
    model.managed.release()
    sampled = time.perf_counter()
    vae.decode(latents[0], quiet=True)
    end = time.perf_counter()
    ends = clock.ends
    later = statistics.median(after - before for before, after in zip(ends[1:], ends[2:], strict=False))
    rows = {
        "until the first step is done": ends[1] - start,
        "of it, moving weights": moving.seconds,
        "of it, above a later step": ends[1] - start - moving.seconds - later,
        "a later step": later,
        "decoding": end - sampled,
        **encoded,
        "all": end - start + sum(encoded.values()),
    }
    peak = {"GiB at the peak": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {}
    return [Row(name, {"s": taken} | (peak if name == "all" else {})) for name, taken in rows.items()]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _limit(gib: float, device: torch.device) -> None:
    """Let torch run out of memory as on a smaller card. Raises ValueError where there is no GPU, or less on it."""
    have = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else 0
    if not 0 < gib <= have:
        raise ValueError(f"--limit must be above 0 and at most the {have:.0f} GiB of the GPU, not {gib:g}.")
    # It does not take a device without a number.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(gib / have, index)


class TimedMoves:
    """A model under the host's memory management, and the `seconds` until it could run.

    Blocks that arrive while others compute count to the first step.
    """

    def __init__(self, managed: Managed) -> None:
        self.managed, self.module, self.seconds = managed, managed.module, 0.0

    def acquire(self, working: int = 0) -> torch.device:
        """As the host does."""
        began = time.perf_counter()
        device = self.managed.acquire(working)
        self.seconds += time.perf_counter() - began
        return device

    def release(self) -> None:
        """As the host does."""
        self.managed.release()


class StepHost(StandaloneHost):
    """Notes when steps end, in place of a progress bar: `ends`, the start first."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device=str(device))
        self.ends: list[float] = []

    def progress(self, total: int, label: str = "") -> StepHost:
        """Itself."""
        return self

    def __enter__(self) -> Self:
        self.update(0)
        return self

    def __exit__(self, *failure: object) -> None:
        return None

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """A step is through."""
        wait_for(self.device())
        self.ends.append(time.perf_counter())
