"""InfiniteTalk 14B at full shapes with random weights: 768x768, 81 frames, 6 steps, CFG 1; time and peak GPU memory.

    python benchmarks/infinitetalk.py [--option QUANTIZATION:ATTENTION ...] [--speakers 2] [--steps 6]
    compute-sanitizer --target-processes all python benchmarks/infinitetalk.py --blocks 2 --size 256 --steps 1

The model is loaded through the pack's own loader from a file that is made up on the fly (40 GB of bf16, in host
memory), each option in a process of its own. Prints one JSON line an option: seconds a step (median, after the first),
seconds of all steps, peak GB; or the loader's refusal. The ratio is to the first option of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.host import StandaloneHost, set_host
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import checkpoint
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.tensor_file import StoredTensor

SHAPES = Path(__file__).parents[1] / "tests/data/checkpoints/skyreels_v3_talking_avatar_14B.json"
DEFAULT = ("disabled:sdpa", "fp8_e4m3fn:sdpa", "fp8_e4m3fn_fast:sdpa", "fp4_scaled:sdpa", "fp4_scaled:sageattn_3_fp4")
SIZE, FRAMES = 768, 81
POOL, SPREAD = 2**26, 0.02
GIGABYTE = 2**30


class RandomFile:
    """A checkpoint of published names and shapes whose values are drawn from a pool of random numbers."""

    metadata: dict[str, str] = {}

    def __init__(self, path: Path, blocks: int) -> None:
        self.path = path
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()
        self.tensors = {
            name: StoredTensor(shape=shape, format="BF16") for name, shape in published_shapes(blocks).items()
        }

    def read(self, name: str) -> Tensor:
        """Norm weights near 1, all else near 0."""
        shape = self.tensors[name].shape
        count = math.prod(shape)
        values = self._pool.repeat(-(-count // POOL))[:count].clone().reshape(shape)
        return values + 1 if "norm" in name and name.endswith("weight") else values


def published_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a 14B image-to-video model with its audio layers in one file, of its first blocks."""
    found: dict[str, tuple[int, ...]] = {}
    for key, value in json.loads(SHAPES.read_text()).items():
        if key == "_meta":
            continue
        if isinstance(value, dict):
            found |= {key.replace("{i}", str(index)): tuple(value["shape"]) for index in range(value["count"])}
        else:
            found[key] = tuple(value)
    numbers = {name: re.match(r"blocks\.(\d+)\.", name) for name in found}
    return {name: shape for name, shape in found.items() if not numbers[name] or int(numbers[name][1]) < blocks}


class StepTimes:
    """Stands in for a progress bar: notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __enter__(self) -> StepTimes:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return self

    def __exit__(self, *failure: object) -> None:
        return None

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """A step is through."""
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class TimingHost(StandaloneHost):
    """Gives out StepTimes."""

    def __init__(self) -> None:
        super().__init__(device="cuda")
        self.times = StepTimes()

    def progress(self, total: int, label: str = "") -> StepTimes:
        """The one clock."""
        return self.times


def request(option: str, case: argparse.Namespace, host: StandaloneHost) -> SampleRequest:
    """The whole case with random inputs."""
    quantization, attention = option.split(":")
    speakers, size = case.speakers, case.size
    checkpoint.open_files = lambda path: (RandomFile(path, case.blocks),)
    options = LoadOptions(base_dtype=torch.bfloat16, quantization=quantization, attention_mode=attention)
    model = load_wan_model(Path("random_InfiniteTalk.safetensors"), options, host, SYSTEMS)
    latent = ((FRAMES - 1) // 4 + 1, size // 8, size // 8)
    mask = torch.zeros(4, *latent)
    mask[:, 0] = 1
    features = tuple(torch.randn(FRAMES, 12, 768) for _ in range(speakers))
    masks = torch.zeros(speakers, size, size)
    for index, part in enumerate(masks.chunk(speakers, dim=0)):
        part[..., index * size // speakers : (index + 1) * size // speakers] = 1
    return SampleRequest(
        model=model,
        text=TextEmbeds(positive=(torch.randn(120, 4096),)),
        image=ImageEmbeds(
            latent_shape=(16, *latent),
            num_frames=FRAMES,
            payloads=(
                ImageCondition(torch.randn(1, 16, *latent), mask[None]),
                ClipImage(positive=torch.randn(1, 257, 1280)),
            ),
        ),
        schedule=make_schedule(ScheduleSpec(name="dpm++_sde", steps=case.steps, shift=11.0)),
        cfg=1.0,
        seed=0,
        payloads=(MultiTalkEmbeds(features=features, masks=masks if speakers > 1 else None),),
    )


def run(option: str, case: argparse.Namespace) -> dict[str, object]:
    """One option in this process."""
    host = TimingHost()
    set_host(host)
    try:
        asked = request(option, case, host)
    except (ValueError, RuntimeError) as error:
        return {"option": option, "refused": str(error)}
    torch.cuda.reset_peak_memory_stats()
    sample(asked, host)
    ends = host.times.ends
    each = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return {
        "option": option,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "blocks": case.blocks,
        "size": case.size,
        "speakers": case.speakers,
        "seconds_a_step": round(statistics.median(each[1:] or each), 3),
        "seconds": round(ends[-1] - ends[0], 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / GIGABYTE, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--option", nargs="+", default=list(DEFAULT))
    parser.add_argument("--speakers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(run(options.option[0], options)) + "\n")
        return
    base: float | None = None
    for option in options.option:
        command = [sys.executable, __file__, "--child", "--option", option]
        for name in ("speakers", "steps", "blocks", "size"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            result: dict[str, object] = {"option": option, "failed": done.returncode}
        else:
            result = json.loads(done.stdout.splitlines()[-1])
        if "seconds_a_step" in result:
            base = base or result["seconds_a_step"]
            result["ratio"] = round(base / result["seconds_a_step"], 3)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
