"""Runs of the demo that are killed at any moment, and many at once in one folder: nothing is lost or left over.

KILLS sets how many runs are killed (none by default: the moments are random, and `make kills` has 100), PAIRS how many
pairs of runs, one with output_path, begin at once in one folder (default 1). Each run is a process of its own; a server
that has imported everything forks it.
"""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from alike import alike
from limits import PATIENCE
from PIL import Image

if sys.platform == "win32":
    pytest.skip("SIGKILL and forked processes are POSIX", allow_module_level=True)

KILLS, PAIRS = (int(os.environ.get(name, count)) for name, count in (("KILLS", 0), ("PAIRS", 1)))
SEED = int(os.environ.get("KILL_SEED", "0"))
FRAMES = 21
SETTINGS = {
    "MultiTalkWav2VecEmbeds.num_frames": FRAMES, "WanVideoSampler.steps": 1,
    "WanVideoImageToVideoMultiTalk.frame_window_size": 9, "WanVideoImageToVideoMultiTalk.motion_frame": 5,
    "WanVideoImageToVideoMultiTalk.width": 64, "WanVideoImageToVideoMultiTalk.height": 64,
}  # fmt: skip
ON_DISK = {"WanVideoImageToVideoMultiTalk.output_path": "talk"}
VIDEO, TALK = r"wanvideo_demo_\d{5}_\.mp4", r"talk/\d{8}_\d{6}_\d{6}_infinitetalk_output"
UNFINISHED = r"(\d{8}_\d{6}_unfinished|rescued_\d{8}_\d{6})"
server = multiprocessing.get_context("forkserver")


def demo(folder, on_disk):
    """In a process of its own: `wanvideo demo`, what it says in a file beside its folder."""
    import torch
    from wanvideo_wrapper.headless.cli import main

    torch.set_num_threads(1)
    with Path(f"{folder}.{os.getpid()}.log").open("w") as log:
        sys.stderr = log
        settings = {**SETTINGS, **(ON_DISK if on_disk else {})}
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        sys.exit(main(["demo", "--device", "cpu", "--out", str(folder), *sets]))


def start(folder, on_disk):
    process = server.Process(target=demo, args=(folder, on_disk))
    process.start()
    return process


def finish(process):
    process.join(PATIENCE)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def decoded(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("frame_*.png"))])


def files(folder, *, rescued=False):
    """The videos; asserts that there is nothing else but whole folders of frames, and prompts that were encoded."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    known = [VIDEO, rf"{TALK}/frame_\d{{5}}\.png", r"cache/text_embeds/[0-9a-f]{32}_[0-9a-f]{32}\.safetensors"]
    known += [rf"{UNFINISHED}/frame_\d{{5}}\.png"] if rescued else []
    assert not [name for name in names if not re.fullmatch("|".join(known), name)]
    empty = [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert not empty
    return sorted(folder.glob("*.mp4"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The frames of a run that nothing happens to and of its video, and how long it takes."""
    # Packages import their parts when these are used: the moments should fall into the run, not into imports.
    parts = [f"transformers.models.{name}.modeling_{name}" for name in ("umt5", "clip", "wav2vec2")]
    parts += ["diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.schedulers"]
    server.set_forkserver_preload(["wanvideo_wrapper.headless.cli", "wanvideo_wrapper", "av", *parts])
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert finish(start(folder, True)) == 0
    began = time.monotonic()
    assert finish(start(folder, False)) == 0
    took = time.monotonic() - began
    first, second = map(decoded, files(folder))
    assert len(first) == FRAMES and first.std() > 10 and alike(first, second)
    (frames,) = folder.glob("talk/*")
    return pictures(frames), first, took


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="kills runs at random moments: make kills")
def test_killed_runs_end_as_if_nothing_had_happened(whole, tmp_path):
    frames, video, took = whole
    chance = random.Random(SEED)
    for number in range(KILLS):
        on_disk, kind = number % 2 == 0, (signal.SIGKILL, signal.SIGTERM)[number // 2 % 2]
        folder, moment = tmp_path / str(number), chance.uniform(0, took * 1.05)
        case = f"run {number}, output_path {on_disk}, {kind.name} after {moment:.3f} of {took:.3f} s, seed {SEED}"
        process = start(folder, on_disk)
        process.join(moment)
        # It may have ended just then.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, kind)
        assert finish(process) in (0, -kind, 130), case
        done = len(list(folder.glob("*.mp4")))
        assert finish(start(folder, on_disk)) == 0, case
        videos = files(folder, rescued=kind == signal.SIGTERM and not on_disk)
        assert len(videos) == done + 1 and all(alike(decoded(path), video) for path in videos), case
        if on_disk:
            kept = list(folder.glob("talk/*"))
            # One more where frames were whole and the video was not: nothing is left of such a run to go on with.
            assert len(kept) in (done + 1, done + 2), case
            assert all(np.array_equal(pictures(path), frames) for path in kept), case
        for rescued in (*folder.glob("*_unfinished"), *folder.glob("rescued_*")):
            saved = pictures(rescued)
            assert np.array_equal(saved, frames[: len(saved)]), case


@pytest.mark.slow
def test_many_runs_in_one_folder(whole, tmp_path):
    frames, video, _ = whole
    folder = tmp_path / "out"
    processes = [start(folder, on_disk) for _ in range(PAIRS) for on_disk in (True, False)]
    assert {finish(process) for process in processes} == {0}
    videos, kept = files(folder), list(folder.glob("talk/*"))
    assert len(videos) == 2 * PAIRS and len(kept) == PAIRS
    assert all(alike(decoded(path), video) for path in videos)
    assert all(np.array_equal(pictures(path), frames) for path in kept)
