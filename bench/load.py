"""Loading a bfloat16 file with --quantization, beside reading that file from the page cache.

The file is written into the folder for temporary files first (14B: 28 GB; TMPDIR chooses another one). Memory is that
of this process above what the loaded model keeps, mapped pages of the file included; layers much smaller than those of
14B leave holes in the C library's heap, which count there.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..host import Host
from ..registry import SYSTEMS
from ..wanvideo.load_plan import LoadOptions
from ..wanvideo.loading import WanVideoModel, load_wan_model
from .clock import seconds
from .random_model import DTYPE, Case, RandomFile, shapes_of
from .report import Row

ROUNDS = 3
BUFFER_BYTES = 2**26
BETWEEN_LOOKS = 0.002
GIB = 2**30


def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """Reading and loading in turns, after a small model that pays for what runs for the first time."""
    wanted = LoadOptions(base_dtype=DTYPE, quantization=case.quantization)
    buffer = bytearray(BUFFER_BYTES)
    with tempfile.TemporaryDirectory(prefix="wanvideo_bench_") as folder:
        whole, small = Path(folder) / "whole.safetensors", Path(folder) / "small.safetensors"
        write(whole, shapes_of(case, case.config.num_layers))
        tiny = replace(case, model="tiny")
        write(small, shapes_of(tiny, 1))
        load_wan_model(small, wanted, host, SYSTEMS)
        calls = {
            "reading the file": lambda: _read(whole, buffer),
            "loading it": lambda: load_wan_model(whole, wanted, host, SYSTEMS),
        }
        times = seconds(calls, host.device(), ROUNDS)
        above = _memory_above(calls["loading it"])
    base = times["reading the file"]
    rows = [Row(name, {"s": taken, "times as long": taken / base}) for name, taken in times.items()]
    rows[1] = replace(rows[1], values={**rows[1].values, "GiB above what is kept": above})
    return rows


def write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of random weights, tensor by tensor."""
    source = RandomFile(shapes, path.stem)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + DTYPE.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(source.read(name).view(torch.int16).numpy().tobytes())


def _read(path: Path, buffer: bytearray) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _memory_above(load: Callable[[], WanVideoModel]) -> float:
    gc.collect()
    before, peak = _resident(), []
    with _watched(peak):
        model = load()
    kept = sum(parameter.nbytes for parameter in model.transformer.parameters())
    return (peak[0] - before - kept) / GIB


@contextmanager
def _watched(peak: list[int]) -> Iterator[None]:
    """Appends the most memory that this process had inside."""
    most, done = [_resident()], threading.Event()

    def look() -> None:
        while not done.wait(BETWEEN_LOOKS):
            most[0] = max(most[0], _resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peak.append(most[0])


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("This system does not tell a process its memory by /proc: run 'wanvideo bench load' on Linux.")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])
