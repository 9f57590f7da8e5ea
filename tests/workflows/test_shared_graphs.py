"""Saved graphs of real users, run headless to a video with tiny models under the very file names that they use.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import av
import pytest
from saved_models import GRAPH_RUNS, GRAPHS, fill
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

TALKING = ("infinitetalk", "video_to_video", "humo")
pytestmark = pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    models, inputs = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("input")
    fill(models, inputs)
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    return models, inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPH_RUNS)
def test_graph_runs_to_a_video(name, folders, tmp_path):
    pattern, edits, bypassed, frames = GRAPH_RUNS[name]
    graph = next(iter(sorted(GRAPHS.glob(pattern))), None)
    if graph is None:
        pytest.skip(f"no graph {pattern} in {GRAPHS}")
    arguments = ["run", graph, "--models", folders[0], "--input", folders[1], "--out", tmp_path, "--device", "cpu"]
    arguments += [part for edit in edits for part in ("--set", edit)]
    arguments += [part for node in bypassed for part in ("--bypass", node)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    (path,) = tmp_path.rglob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert sum(1 for _ in container.decode(stream)) == frames
        assert bool(container.streams.audio) == (name in TALKING)
        assert {"prompt", "workflow"} <= set(container.metadata)
