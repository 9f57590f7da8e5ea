"""How long loading a bfloat16 file into FP8 takes, beside reading that file from the page cache in the same run.

    python benchmarks/loading.py [--layers 40] [--dim 5120] [--option fp8_e4m3fn] [--device cuda] [--rounds 3]

Writes a file of random weights into a temporary folder (14B: 28 GB, in bfloat16) and reads it once, so that the page
cache holds it; then reads it into one buffer and loads it, in turns. Prints one JSON line: medians in seconds, their
ratio (the aim is 1.3 for 14B on a GPU), and the peak of host memory above what the loaded model keeps, mapped pages of
the file included. Layers much smaller than those of 14B leave holes in the C library's heap, which count there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel

BUFFER_BYTES = 2**26
HEAD_SIZE = 128
BETWEEN_LOOKS = 0.002


def write_model(path: Path, dim: int, layers: int) -> None:
    """A text-to-video model in bfloat16, layer by layer."""
    with torch.device("meta"):
        ffn_dim = dim * 27 // 640 * 64
        model = WanModel(WanConfig(dim=dim, ffn_dim=ffn_dim, num_heads=dim // HEAD_SIZE, num_layers=layers))
    header, end = {"__metadata__": {"wanvideo.num_heads": str(dim // HEAD_SIZE)}}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
            file.write(values.view(torch.int16).numpy().tobytes())


def read_all(path: Path, buffer: bytearray) -> None:
    """The whole file, piece by piece into the same memory."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    return 0


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """Appends the most memory that this process had inside."""
    most, done = [resident()], threading.Event()

    def look() -> None:
        while not done.wait(BETWEEN_LOOKS):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peak.append(most[0])


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, and of what it left the device to do."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """Reading and loading in turns."""
    host, buffer, peaks, extra = StandaloneHost(device=options.device), bytearray(BUFFER_BYTES), [], []
    wanted = LoadOptions(base_dtype=torch.bfloat16, quantization=options.option)
    reading, loading = [], []
    read_all(path, buffer)
    # What runs for the first time: kernels, threads, the device's context.
    small = path.with_name("small.safetensors")
    write_model(small, 2 * HEAD_SIZE, 1)
    load_wan_model(small, wanted, host, SYSTEMS)
    for _ in range(options.rounds):
        reading.append(seconds(lambda: read_all(path, buffer), options.device))
        before, models = resident(), []
        with watched(peaks):
            loading.append(seconds(lambda: models.append(load_wan_model(path, wanted, host, SYSTEMS)), options.device))  # noqa: B023
        kept = sum(p.nbytes for p in models[0].transformer.parameters())
        extra.append(peaks[-1] - before - kept)
    read, load = statistics.median(reading), statistics.median(loading)
    return {
        "file_gb": round(path.stat().st_size / 1e9, 3),
        "kept_gb": round(kept / 1e9, 3),
        "read_s": round(read, 3),
        "load_s": round(load, 3),
        "ratio": round(load / read, 3),
        "peak_above_kept_gb": round(max(extra) / 1e9, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--dim", type=int, default=5120)
    parser.add_argument("--option", default="fp8_e4m3fn")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the file is written; it needs room for it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, options.dim, options.layers)
        result = {"option": options.option, "device": options.device, **measured(path, options)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
