"""What a person who waits sees of a run: previews of the video, a bar that ends once, and the video."""

import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from comfy_server import PYTHON
from PIL import Image
from posted_graphs import api_prompt
from saved_models import ROOT

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
STEPS, FRAMES = 4, 33
EDITS = (f"WanVideoSampler.steps={STEPS}", f"MultiTalkWav2VecEmbeds.num_frames={FRAMES}")


@pytest.fixture(scope="module")
def watched(server, tmp_path_factory):
    """(the prompt, events of the server, previews in order) of a run of the demo with one window."""
    folder = tmp_path_factory.mktemp("previews")
    prompt, _ = api_prompt(ROOT / "example_workflows/demo_infinitetalk.json", ROOT / "demo", EDITS)
    (folder / "prompt.json").write_text(json.dumps(prompt))
    server.forget()
    command = [PYTHON, Path(__file__).with_name("listener.py"), server.url, folder / "prompt.json", folder]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    return prompt, json.loads(done.stdout), pictures


def of_node(watched, kind, event):
    """What the server said of the one node of this class."""
    prompt, events, _ = watched
    (number,) = [key for key, node in prompt.items() if node["class_type"] == kind]
    return [entry["data"] for entry in events if entry["type"] == event and entry["data"].get("node") == number]


def test_the_bar_ends_once(watched):
    steps = [(entry["value"], entry["max"]) for entry in of_node(watched, "WanVideoSampler", "progress")]
    assert steps == sorted(set(steps)) and len({most for _, most in steps}) == 1
    assert len(steps) > STEPS and steps[-1][0] == steps[-1][1]


def test_the_video_comes_once(watched, server):
    (shown,) = of_node(watched, "SaveVideo", "executed")
    (entry,) = shown["output"]["images"]
    with av.open(str(server.base / "output" / entry["subfolder"] / entry["filename"])) as container:
        assert container.streams.audio and sum(1 for _ in container.decode(video=0)) == FRAMES
    assert watched[1][-1]["type"] == "execution_success"


def test_previews_show_the_video(watched, server):
    """One a step. The demo's latents are not Wan's, so that ComfyUI's factors give false colors of the right shapes."""
    _, _, pictures = watched
    assert len(pictures) == STEPS and len({picture.size for picture in pictures}) == 1
    path = max(server.base.rglob("output/**/*.mp4"), key=lambda file: file.stat().st_mtime)
    with av.open(str(path)) as container:
        frame = [frame.to_image() for frame in container.decode(video=0)][FRAMES // 2]
    for picture in pictures:
        assert explained(frame, by=picture) > 0.4
        assert explained(frame.transpose(Image.Transpose.ROTATE_90), by=picture) < 0.2


def explained(frame, by):
    """The share of a frame's variance, at a latent a pixel, that is linear in the preview's colors."""
    wanted, shown = (
        np.asarray(image.resize((16, 16), Image.Resampling.BOX), float).reshape(-1, 3) for image in (frame, by)
    )
    factors = np.c_[shown, np.ones(len(shown))]
    rest = wanted - factors @ np.linalg.lstsq(factors, wanted, rcond=None)[0]
    return 1 - rest.var() / (wanted - wanted.mean(0)).var()
