"""Hours of speech through `wanvideo demo` on the CPU: memory stays flat, video and sound are as long as the speech.

The demo's models but for its VAE, whose decoder takes three quarters of the time on a CPU: a narrow random one serves.

SPEECH_SECONDS sets how long the speech is (none by default, since an hour takes long; `make hour` has 3600).
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from wanvideo_wrapper import demo
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.wanvideo.modules.vae import build_vae
from wanvideo_wrapper.wanvideo.modules.vae_keys import VaeLayout

SECONDS = float(os.environ.get("SPEECH_SECONDS", "0"))
FPS, RATE = 25, 16000
MEGABYTE = 2**20
# The smallest frames, few and long windows, one step; frames go to disk, as those of a long video must.
SETTINGS = {
    "WanVideoImageToVideoMultiTalk.width": 64, "WanVideoImageToVideoMultiTalk.height": 64,
    "WanVideoImageToVideoMultiTalk.frame_window_size": 81, "WanVideoSampler.steps": 1,
    "WanVideoImageToVideoMultiTalk.output_path": "talk",
}  # fmt: skip
COMMAND = """
import sys
from pathlib import Path
from wanvideo_wrapper import demo
from wanvideo_wrapper.headless.cli import main
demo.MODELS = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def speak(path, seconds):
    """The demo's sentence, again and again."""
    with wave.open(str(demo.INPUT / "speech.wav")) as sentence, wave.open(str(path), "wb") as speech:
        assert sentence.getframerate() == RATE
        speech.setparams(sentence.getparams())
        data = np.frombuffer(sentence.readframes(sentence.getnframes()), np.int16)
        for start in range(0, round(seconds * RATE), len(data)):
            speech.writeframes(data[: round(seconds * RATE) - start].tobytes())


def models(folder):
    """The demo's, with the narrow VAE."""
    shutil.copytree(demo.MODELS, folder)
    layout = VaeLayout(
        base_dim=2, decoder_base_dim=2, z_dim=16, stages=(1, 1, 1, 1), res_blocks=1, temporal=(False, True, True),
        channels=3, nested=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tiny.vae_file(build_vae(layout), layout).save(folder / "vae/tiny_wan_vae.safetensors")
    return folder


def status(pid):
    """Resident memory of a process in bytes: without the files that it maps, and with them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return int(values["RssAnon"]) * 1024, int(values["VmRSS"]) * 1024


def frames_so_far(folder):
    """Frames of the unfinished run; None before the first window and after the last."""
    for record in folder.glob("talk/*/.unfinished/run.json"):
        try:
            return json.loads(record.read_text())["frames"]
        except (OSError, ValueError):
            return None
    return None


def watched(process, folder):
    """(seconds, frames, anonymous bytes, resident bytes) of the run until it ends, once a second in an hour's."""
    began, samples = time.monotonic(), []
    while process.poll() is None:
        try:
            samples.append((time.monotonic() - began, frames_so_far(folder), *status(process.pid)))
        except (OSError, KeyError):
            # It ended just now.
            break
        time.sleep(min(0.1 + SECONDS / 3600, 1))
    return samples


def lengths(path):
    """Frames and their span, and samples and theirs, in seconds."""
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
    with av.open(str(path)) as file:
        sound = sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0))
    return frames, sound


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="an hour of speech takes long: make hour")
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_hours_of_speech_in_flat_memory(tmp_path):
    speak(tmp_path / "speech.wav", SECONDS)
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    options = ["--device", "cpu", "--speech", str(tmp_path / "speech.wav"), "--out", str(tmp_path / "out"), *sets]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", COMMAND, str(models(tmp_path / "models")), "demo", *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        samples = watched(process, tmp_path / "out")
    assert process.wait() == 0, (tmp_path / "log").read_text()[-2000:]
    total = round(SECONDS * FPS)
    (video,) = (tmp_path / "out").glob("*.mp4")
    frames, sound = lengths(video)
    assert frames == total and math.isclose(sound, SECONDS, abs_tol=1 / FPS)
    (folder,) = (tmp_path / "out").glob("talk/*")
    assert len(list(folder.glob("frame_*.png"))) == total and not (folder / ".unfinished").exists()
    windows = [sample for sample in samples if sample[1]]
    early = [sample for sample in windows if sample[1] <= total / 5]
    settled = max(memory for *_, memory, _ in early)
    after = samples[samples.index(early[-1]) :]
    most = max(memory for *_, memory, _ in after)
    table = "\n".join(
        f"{seconds:7.0f} s {done or 0:6d} frames {anonymous / MEGABYTE:6.0f} MB {resident / MEGABYTE:6.0f} MB resident"
        for seconds, done, anonymous, resident in samples[:: max(len(samples) // 40, 1)]
    )
    (tmp_path / "memory.txt").write_text(table)
    assert most <= settled * 1.05 + 32 * MEGABYTE, table
