"""Peak host memory of a long talking video on tiny models, against that of a short one (Linux, macOS).

    python benchmarks/long_video_memory.py [--seconds 10 600] [--memory | --demo]

Each length runs in a process of its own: speech of that length through Wav2Vec2, then all windows at 64x64 in one step,
with frames on disk (or, with --memory, returned). With --demo it is the command `wanvideo demo`, from a sound file to
the video file. Prints one JSON line: frames, seconds and peak resident MB by length, and how much the longest needs
above the shortest.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
import torch
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.headless.cli import main as main_command
from wanvideo_wrapper.host import StandaloneHost, set_host
from wanvideo_wrapper.multitalk.nodes import WanVideoImageToVideoMultiTalk
from wanvideo_wrapper.multitalk.nodes_audio import MultiTalkWav2VecEmbeds
from wanvideo_wrapper.multitalk.wav2vec import SAMPLE_RATE, load_wav2vec
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

FPS, SIZE, WINDOW, MOTION = 25.0, 64, 81, 9
MEGABYTE = 2**20
# ru_maxrss counts kilobytes on Linux, bytes on macOS.
UNIT = 1 if sys.platform == "darwin" else 1024


def talk(seconds: float, folder: Path, *, on_disk: bool) -> dict[str, float]:
    """Make the video in this process; frames, seconds and peak resident MB."""
    host = StandaloneHost(outputs=folder / "output", device="cpu")
    set_host(host)
    tiny.transformer(in_dim=36).save(folder / "base.safetensors")
    tiny.speech_module().save(folder / "infinitetalk.safetensors")
    tiny.vae(base_dim=4).save(folder / "vae.safetensors")
    tiny.wav2vec().save(folder / "wav2vec.safetensors")
    wav2vec = load_wav2vec(folder / "wav2vec.safetensors", dtype=torch.float32, host=host)
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=host)
    options = LoadOptions(base_dtype=torch.float32, modules=(ModuleFile(folder / "infinitetalk.safetensors"),))
    model = load_wan_model(folder / "base.safetensors", options, host, SYSTEMS)
    rng = np.random.default_rng(0)
    waveform = torch.from_numpy(rng.standard_normal((1, 1, round(seconds * SAMPLE_RATE)), dtype=np.float32) * 0.1)
    began = time.monotonic()
    speech, _, frames = MultiTalkWav2VecEmbeds().process(
        wav2vec, True, FPS, round(seconds * FPS), {"waveform": waveform, "sample_rate": SAMPLE_RATE}, 1.0, 1.0, "para"
    )
    picture = torch.from_numpy(rng.random((1, SIZE, SIZE, 3), dtype=np.float32))
    path = "talk" if on_disk else ""
    image, _ = WanVideoImageToVideoMultiTalk().process(
        vae, SIZE, SIZE, WINDOW, MOTION, False, "disabled", picture, mode="infinitetalk", output_path=path
    )
    request = SampleRequest(
        model=model,
        text=TextEmbeds(positive=(torch.zeros(4, tiny.TEXT_DIM),)),
        image=image,
        schedule=make_schedule(ScheduleSpec(name="euler", steps=1, shift=5.0)),
        cfg=1.0,
        seed=0,
        payloads=(speech,),
    )
    sample(request, host)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / MEGABYTE
    return {"frames": frames, "seconds": round(time.monotonic() - began, 1), "peak_mb": round(peak, 1)}


def demo(seconds: float, folder: Path) -> dict[str, float]:
    """Run the demo in this process, with its own sentence said over and over; as `talk`."""
    with wave.open(str(INPUT / "speech.wav"), "rb") as source:
        sentence, count, rate = source.readframes(source.getnframes()), source.getnframes(), source.getframerate()
        speech = folder / "speech.wav"
        with wave.open(str(speech), "wb") as file:
            file.setparams(source.getparams())
            for _ in range(math.ceil(seconds * rate / count)):
                file.writeframesraw(sentence)
    began = time.monotonic()
    sizes = {"width": SIZE, "height": SIZE, "frame_window_size": WINDOW, "motion_frame": MOTION, "output_path": "talk"}
    settings = {f"WanVideoImageToVideoMultiTalk.{name}": value for name, value in sizes.items()}
    sets = [f"--set={name}={value}" for name, value in (settings | {"WanVideoSampler.steps": 1}).items()]
    status = main_command(["demo", "--device=cpu", f"--out={folder / 'out'}", f"--speech={speech}", *sets])
    if status or not list((folder / "out").glob("*.mp4")):
        raise RuntimeError(f"The demo ended with status {status}.")
    frames = sum(1 for _ in (folder / "out/talk").rglob("frame_*.png"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / MEGABYTE
    return {"frames": frames, "seconds": round(time.monotonic() - began, 1), "peak_mb": round(peak, 1)}


def measure(seconds: float, *options: str) -> dict[str, float]:
    """`talk` or `demo` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder, "--seconds", str(seconds), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The run of {seconds} seconds failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 600.0])
    parser.add_argument("--memory", action="store_true", help="return the frames instead of writing them")
    parser.add_argument("--demo", action="store_true", help="measure the command `wanvideo demo`")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        seconds, folder = options.seconds[0], options.child
        result: dict[str, object] = (
            demo(seconds, folder) if options.demo else talk(seconds, folder, on_disk=not options.memory)
        )
    else:
        chosen = [f"--{name}" for name in ("memory", "demo") if getattr(options, name)]
        runs = {seconds: measure(seconds, *chosen) for seconds in options.seconds}
        peaks = [run["peak_mb"] for run in runs.values()]
        result = {"runs": runs, "growth_mb": round(peaks[-1] - peaks[0], 1)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
