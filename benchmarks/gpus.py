"""One 14B video on two GPUs of one host against one of them, in the same processes and with the same weights.

    NCCL_NVLS_ENABLE=0 python benchmarks/gpus.py [--gpus 2] [--option fp8_e4m3fn_fast:auto_fp8] [--blocks 40]
        [--exchange copies collectives] [--overlap none projections] [--trace trace.json]
    NCCL_NVLS_ENABLE=0 python benchmarks/gpus.py --option disabled:sdpa --other-kernel

Random weights in the shapes of InfiniteTalk 14B, the same on every rank. Cases: 832x480 without and with CFG, and
768x768 with speech; 81 frames. A number is the median of the steps behind the first. Prints one JSON line a case,
exchange and overlap. Exchanges: by the copy engines, which is what the package does where it can; by NCCL. Overlaps:
every exchange is waited for at once; v and q are sent before q and k are projected, which is what the package does.
--trace says how much of the exchange ran beside other kernels. --other-kernel compares one GPU by torch's flash kernel
with one by its own choice.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel
from wanvideo_wrapper.bench.random_model import Case, load
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.distributed import sequence
from wanvideo_wrapper.distributed.exchange import Collectives, Exchange, Route
from wanvideo_wrapper.distributed.host import RankHost
from wanvideo_wrapper.distributed.ranks import ProcessRanks
from wanvideo_wrapper.host import set_host
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.loading import WanVideoModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.shard import ALONE, Arriving

FRAMES, GIGABYTE, TOTAL = 81, 2**30, 8


def payloads(height: int, width: int, spoken: bool) -> tuple[Payload, ...]:
    """The picture, its CLIP features, and one speaker."""
    latent = ((FRAMES - 1) // 4 + 1, height // 8, width // 8)
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 4, *latent)
    mask[:, :, 0] = 1
    picture = ImageCondition(torch.randn(1, 16, *latent, generator=generator), mask)
    clip = ClipImage(positive=torch.randn(1, 257, 1280, generator=generator))
    if not spoken:
        return picture, clip
    features = torch.randn(FRAMES, 12, 768, generator=generator)
    speech = MultiTalkEmbeds(features=(features,)).window(whole_window(latent[0]))
    return picture, clip, speech


def seconds(model: WanVideoModel, *, size: tuple[int, int], cfg: float, spoken: bool, steps: int) -> dict[str, object]:
    """Median seconds of a step, the peak of this card, and the sum of the last velocity."""
    device = model.managed.acquire()
    height, width = size
    generator = torch.Generator().manual_seed(2)
    conditions = Conditions(
        positive=torch.randn(120, 4096, generator=generator),
        negative=torch.randn(60, 4096, generator=generator),
        payloads=payloads(height, width, spoken),
    )
    latents = torch.randn(16, (FRAMES - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    torch.cuda.reset_peak_memory_stats()
    times = []
    with model.active() as transformer, torch.no_grad():
        guidance = Guidance(cfg=(cfg,), payloads=conditions.payloads)
        denoiser = Denoiser(transformer, conditions, guidance=guidance, device=device, dtype=model.base_dtype)
        for index in range(steps + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            velocity = denoiser(latents, torch.tensor(500.0), Step(index=index, total=TOTAL, in_run=index))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIGABYTE
    return {"seconds": statistics.median(times[1:] or times), "peak_gb": peak, "velocity": velocity.cpu()}


EXCHANGES = ("copies", "collectives")
OVERLAPS = ("none", "projections")


@contextlib.contextmanager
def exchanging(exchange: str, overlap: str) -> Iterator[None]:
    """Inside, heads are exchanged in this way, beside so much work. Raises RuntimeError where there are no copies."""
    shard = sequence.SequenceShard
    usual = shard._exchange

    def chosen(self: sequence.SequenceShard) -> Exchange:
        if exchange == "copies" and self.exchange is None:
            raise RuntimeError(
                "These GPUs cannot write into each other's memory: see the log, or --exchange collectives."
            )
        found = usual.fget(self) if exchange == "copies" else Collectives(self.group, self.rank)
        return found if overlap == "projections" else partial(at_once, found)

    shard._exchange = property(chosen)
    try:
        yield
    finally:
        shard._exchange = usual


def at_once(exchange: Exchange, route: Route) -> Arriving:
    """An exchange that nothing runs beside."""
    received = exchange(route)()
    return lambda: received


CASES = {
    "14B 832x480": dict(size=(480, 832), cfg=1.0, spoken=False),
    "14B 832x480, CFG": dict(size=(480, 832), cfg=5.0, spoken=False),
    "InfiniteTalk 768x768": dict(size=(768, 768), cfg=1.0, spoken=True),
}


def load_on(host: RankHost, options: argparse.Namespace) -> WanVideoModel:
    """The random model for this rank's card."""
    quantization, attention = options.option.split(":")
    case = Case(model="14B", size=(832, 480, FRAMES), speakers=1, quantization=quantization, attention=attention)
    return load(case, options.blocks, host)


@contextlib.contextmanager
def only_first(model: WanVideoModel, rank: int) -> Iterator[bool]:
    """Inside, the first rank works by itself; the others wait behind it."""
    with model.transformer.shared_by(ALONE):
        yield rank == 0
    dist.barrier()


def host_memory() -> float:
    """Peak of this process's resident memory, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rank_main(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank: load, then every case by the first rank alone and by all."""
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s")
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = dist.FileStore(f"{folder}/store", options.gpus)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=options.gpus, device_id=device)
    host = RankHost(device=f"cuda:{rank}")
    host.ranks = ProcessRanks(device)
    set_host(host)
    began = time.perf_counter()
    model = load_on(host, options)
    loaded = time.perf_counter() - began
    for name in options.cases or CASES:
        case = CASES[name]
        alone: dict[str, object] = {}
        other = None
        with only_first(model, rank) as mine:
            if mine:
                alone = seconds(model, **case, steps=options.steps)
            if mine and options.other_kernel:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    other = relative(seconds(model, **case, steps=0)["velocity"], alone["velocity"])
        for exchange, overlap in forms(options):
            with exchanging(exchange, overlap):
                shared = seconds(model, **case, steps=options.steps)
            every: list[object] = [None] * options.gpus
            dist.all_gather_object(every, (shared["peak_gb"], host_memory()))
            if rank:
                continue
            say({
                "case": name,
                "option": options.option,
                "exchange": exchange,
                "overlap": overlap,
                "device": torch.cuda.get_device_name(),
                "gpus": options.gpus,
                "blocks": options.blocks,
                "seconds_one": round(alone["seconds"], 3),
                "seconds_all": round(shared["seconds"], 3),
                "speedup": round(alone["seconds"] / shared["seconds"], 3),
                "relative_difference": relative(shared["velocity"], alone["velocity"]),
                "relative_difference_of_other_kernel": other,
                "peak_gb_one": round(alone["peak_gb"], 2),
                "peak_gb_each": [round(peak, 2) for peak, _ in every],
                "host_gb_each": [round(memory, 2) for _, memory in every],
                "seconds_to_load": round(loaded, 1),
            })  # fmt: skip
    for exchange, overlap in forms(options) if options.trace else ():
        with exchanging(exchange, overlap):
            traced(model, options.trace, rank, f"{exchange}, {overlap}")
    dist.destroy_process_group()


def forms(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Exchanges and overlaps that are asked for."""
    return list(itertools.product(options.exchange, options.overlap))


def say(report: dict[str, object]) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def relative(velocity: torch.Tensor, other: torch.Tensor) -> float:
    """Size of the difference, in three digits."""
    return float(f"{(velocity - other).norm() / other.norm():.3g}")


def traced(model: WanVideoModel, path: Path, rank: int, form: str) -> None:
    """Two shared steps under the profiler: how much of the exchange runs beside other kernels, and when none runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(model, **CASES["14B 832x480"], steps=1)
    if rank:
        return
    profiler.export_chrome_trace(str(path))
    spans = json.loads(path.read_text())["traceEvents"]
    talk = _joined(e for e in spans if _exchanges(e))
    work = _joined(e for e in spans if e.get("cat") == "kernel" and not _exchanges(e))
    total, busy, either = (sum(stop - start for start, stop in parts) for parts in (talk, work, _merged(talk + work)))
    idle = work[-1][1] - work[0][0] - busy
    say({
        "form": form,
        "exchange_ms": round(total / 1000, 2),
        "beside_other_kernels_ms": round((total + busy - either) / 1000, 2),
        "no_other_kernel_ms": round(idle / 1000, 2),
    })  # fmt: skip


def _exchanges(event: dict[str, object]) -> bool:
    """A kernel of NCCL, or a copy from card to card."""
    name = str(event.get("name"))
    return (
        event.get("cat") == "kernel" and "nccl" in name.lower() or event.get("cat") == "gpu_memcpy" and "PtoP" in name
    )


def _joined(events: Iterable[dict[str, object]]) -> list[tuple[float, float]]:
    return _merged([(event["ts"], event["ts"] + event["dur"]) for event in events])


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Times in which any of them runs."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--option", default="fp8_e4m3fn_fast:auto_fp8", help="QUANTIZATION:ATTENTION")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES))
    parser.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=["copies"])
    parser.add_argument("--overlap", nargs="+", choices=OVERLAPS, default=["projections"])
    parser.add_argument("--other-kernel", action="store_true", help="for an option that ends in :sdpa")
    parser.add_argument("--trace", type=Path, help="a file for the profiler's trace of a shared step")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, args=(folder, options), nprocs=options.gpus, start_method="spawn")


if __name__ == "__main__":
    main()
