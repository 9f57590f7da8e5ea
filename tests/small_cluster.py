"""The four talking videos of `make cluster-demo`, small enough for tests: its command and its jobs, at 64x64."""

import json
import re
import shlex
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 13
SMALL = {
    "WanVideoSampler.steps": 1, "WanVideoImageToVideoMultiTalk.width": 64,
    "WanVideoImageToVideoMultiTalk.height": 64, "WanVideoImageToVideoMultiTalk.frame_window_size": 9,
    "WanVideoImageToVideoMultiTalk.motion_frame": 5,
}  # fmt: skip


def write_jobs(folder, frames=FRAMES):
    """The jobs of the demo with the small values; returns their file and their names."""
    path = ROOT / "demo/cluster.jsonl"
    jobs = [json.loads(line) for line in path.read_text().splitlines()]
    for job in jobs:
        job["workflow"] = str((path.parent / job["workflow"]).resolve())
        job["set"] |= {**SMALL, "MultiTalkWav2VecEmbeds.num_frames": frames}
    (folder / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    return folder / "jobs.jsonl", [job["id"] for job in jobs]


def command(jobs, out):
    """What `make cluster-demo` gives to `wanvideo`, for these jobs and this folder; paths from the root."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    line = re.search(r"^\t\$\(BIN\)/wanvideo (batch demo/cluster\.jsonl .*)$", makefile, re.MULTILINE)[1]
    words = shlex.split(line)
    words[words.index("demo/cluster.jsonl")] = str(jobs)
    words[words.index("--out") + 1] = str(out)
    return words


def videos(out, names):
    """The frames [n, H, W, 3] of each job's one video."""
    return [_frames(*(out / name).glob("*.mp4")) for name in names]


def _frames(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def actors(mark):
    """Processes of Ray's actors that are at work and have this item, NAME=value, in their environment.

    Ray starts them elsewhere in the tree than below the driver; they inherit what the cluster was started with.
    """
    every = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    at_work = [pid for pid in every if read(pid, "cmdline")[0] == "ray::_Actor.run"]
    return [pid for pid in at_work if mark in read(pid, "environ")]


def read(pid, name):
    """The parts of a process's file; one that is gone has none."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return [""]
