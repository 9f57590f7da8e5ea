"""`wanvideo demo` end to end, and the files that it ships with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from import_path import import_path
from PIL import Image
from safetensors import safe_open
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import INPUT, MODELS, WORKFLOW, tiny
from wanvideo_wrapper.demo.train import sizes, stages
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import load
from wanvideo_wrapper.wanvideo.modules.vae import build_vae

TESTS = Path(__file__).parents[1]
GIB = 1024**3
FRAMES = 42
# What the system tells of a child's peak is that of the process that started it, where that is larger.
CODE = """
import sys
from pathlib import Path
from limits import memory
from wanvideo_wrapper.headless.cli import main
peak = Path(sys.argv.pop(1))
status = main()
peak.write_text(str(memory("VmHWM")))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo with fewer frames and steps, in a process of its own: (path, what it printed, peak memory in bytes)."""
    out = tmp_path_factory.mktemp("demo")
    edits = (f"MultiTalkWav2VecEmbeds.num_frames={FRAMES}", "WanVideoSampler.steps=2")
    options = [part for edit in edits for part in ("--set", edit)]
    peak = tmp_path_factory.mktemp("peak") / "bytes"
    command = [sys.executable, "-c", CODE, str(peak), "demo", "--device", "cpu", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": import_path(TESTS)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    (path,) = out.glob("*.mp4")
    return path, done.stdout, int(peak.read_text())


@pytest.fixture(scope="module")
def frames(made):
    with av.open(str(made[0])) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_prints_the_path_of_the_video(made):
    path, printed, _ = made
    assert printed.split() == [str(path)]


@pytest.mark.slow
def test_video_has_picture_sound_and_workflow(made, frames):
    with av.open(str(made[0])) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert video.average_rate == 25
        samples = np.concatenate([part.to_ndarray() for part in container.decode(sound)], axis=1)
        assert samples.shape[1] / sound.rate == pytest.approx(FRAMES / 25, abs=0.1)
        assert np.abs(samples).max() > 0.05
        stored = json.loads(container.metadata["workflow"])
    assert stored == json.loads(WORKFLOW.read_text(encoding="utf-8"))
    assert frames.shape == (FRAMES, 128, 128, 3)


@pytest.mark.slow
def test_picture_moves_and_is_not_flat(frames):
    pixels = frames.astype(np.float64)
    assert pixels.std(axis=(1, 2, 3)).min() > 3
    assert np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3)).max() > 1


@pytest.mark.slow
def test_memory(made):
    if sys.platform != "linux":
        pytest.skip("the peak memory of a process is read from /proc")
    assert 0.1 * GIB < made[2] < 4 * GIB


def shapes_of(path):
    with safe_open(path, framework="pt") as file:
        # The tokenizer's bytes depend on the version of sentencepiece that made it.
        keys = [key for key in file.keys() if key != "spiece_model"]  # noqa: SIM118
        return {key: file.get_slice(key).get_shape() for key in keys}, file.metadata()


def test_models_have_the_keys_and_shapes_that_training_writes(tmp_path):
    plan = stages.Plan(out=tmp_path, device=torch.device("cpu"))
    stages.save_transformer(stages.new_transformer(), plan)
    stages.save_seers(plan, tiny.wav2vec_model(5), build_vae(sizes.VAE))
    for name in stages.FILES.values():
        assert shapes_of(MODELS / name) == shapes_of(tmp_path / "models" / name), name


def test_files_are_small():
    sizes = [path.stat().st_size for folder in (MODELS, INPUT) for path in folder.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) < 10e6


def test_workflow_names_known_nodes_and_present_files():
    classes = {**STAND_INS, **NODE_CLASS_MAPPINGS}
    saved = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    assert {node["type"] for node in saved["nodes"]} <= classes.keys() | {"MarkdownNote"}
    prompt = load(WORKFLOW, classes)
    assert any(getattr(classes[node.type], "OUTPUT_NODE", False) for node in prompt.nodes.values())
    present = {path.name for path in MODELS.rglob("*")}
    named = {
        value
        for node in prompt.nodes.values()
        for value in node.inputs.values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    assert named
    assert named <= present


def test_the_demo_node_gives_what_the_files_hold():
    portrait, speech = NODE_CLASS_MAPPINGS["WanVideoDemoInputs"]().load()
    with Image.open(INPUT / "portrait.png") as picture:
        assert np.array_equal((portrait[0] * 255).round().byte().numpy(), np.array(picture.convert("RGB")))
    with av.open(str(INPUT / "speech.wav")) as container:
        samples = np.concatenate([part.to_ndarray() for part in container.decode(audio=0)], axis=1)
        assert speech["sample_rate"] == container.streams.audio[0].rate
    assert np.array_equal(speech["waveform"][0].numpy() * 2**15, samples) and np.abs(samples).max() > 1000
