"""A whole video at the model's full depth: the steps of the sampler, and the decoding of what they made.

A talking video with --speakers. Prompt and picture are random numbers, so that no encoder is needed; what it would add
is a matter of seconds a video. The whole model is drawn first: 14B takes a minute and 28 GB of main memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Self

import torch
from torch import Tensor

from ..host import Host, StandaloneHost
from ..wanvideo.block_swap import BlockSwapArgs
from ..wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from ..wanvideo.sampling import sample
from ..wanvideo.schedulers import ScheduleSpec, make_schedule
from .clock import wait_for
from .random_model import Case, inputs_of, load
from .report import Row
from .vae import random_vae

GIB = 2**30


def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """The first step, the later ones, decoding and all together."""
    if options.steps < 2:
        raise ValueError(f"--steps must be at least 2, not {options.steps}: the first is told by itself.")
    device, clock = host.device(), StepHost(host.device())
    swap = None if options.swap is None else BlockSwapArgs(blocks_to_swap=options.swap)
    model = load(case, case.config.num_layers, clock, swap)
    vae = random_vae(case, clock)
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
    start = time.perf_counter()
    latents = sample(request, clock)[0]["samples"]
    model.managed.release()
    sampled = time.perf_counter()
    vae.decode(latents[0], quiet=True)
    end = time.perf_counter()
    ends = clock.ends
    later = [after - before for before, after in zip(ends[1:], ends[2:], strict=False)]
    rows = {
        "until the first step is done": ends[1] - start,
        "a later step": statistics.median(later),
        "decoding": end - sampled,
        "all": end - start,
    }
    peak = {"GiB at the peak": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {}
    return [Row(name, {"s": taken} | (peak if name == "all" else {})) for name, taken in rows.items()]


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
