"""The first five minutes: a ComfyUI with this pack alone, its own template, Run, and a video that plays.

Nothing is copied and no model is made: what the demo needs lies in the pack.
"""

import json
import os
import subprocess
from pathlib import Path

import av
import pytest
from comfy_server import PYTHON, browser_is_missing, missing, serving

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of its own: what the first page shows is seen once."""
    reason = missing() or browser_is_missing()
    if reason:
        pytest.skip(reason)
    with serving(tmp_path_factory.mktemp("newcomer")) as running:
        yield running


@pytest.fixture(scope="module")
def seen(server, tmp_path_factory):
    pictures = Path(os.environ.get("WANVIDEO_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("newcomer.py")
    arguments = [server.url, pictures / "newcomer.png", "ComfyUI-WanVideoWrapper-Aligned", "demo_infinitetalk"]
    command = [str(part) for part in (PYTHON, script, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_demo_runs_from_the_templates_to_a_video(seen, server):
    assert seen["errors"] == [] and seen["red"] == []
    assert any("wanvideo_demo" in source for source in seen["videos"])
    (path,) = server.base.rglob("wanvideo_demo*.mp4")
    with av.open(str(path)) as container:
        assert container.streams.audio and sum(1 for _ in container.decode(video=0)) == 100


def test_progress_grows_and_ends_at_its_end(seen):
    assert seen["progress"], "the sampler shows progress"
    for steps in seen["progress"].values():
        values = [value / most for value, most in steps]
        assert values == sorted(values) and values[-1] == 1
        assert len(set(map(tuple, steps))) == len(steps), "a value is sent once"
