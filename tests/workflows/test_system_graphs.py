"""Saved graphs of systems run headless to videos, with tiny models under the file names that they use."""

import sys

import av
import numpy as np
import pytest
from foreign_nodes import run_graph
from system_graphs import Files, all_cases, assert_made

CASES = all_cases()
# Of videos on a GPU beside those on the CPU; a CPU's in float32 beside its own in 16 bits have 33 to 58.
LEAST_PSNR = 30.0


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    case = CASES[request.param]
    if not case.path.is_file():
        pytest.skip(f"no {case.path} (set WANVIDEO_GRAPHS)")
    case.fill(Files(tmp_path))
    for module, make in case.modules.items():
        monkeypatch.setitem(sys.modules, module, make())
    return case


def test_graph_runs_to_its_videos(case, tmp_path, monkeypatch):
    assert_made(case, run_graph(case, tmp_path, monkeypatch))


@pytest.mark.cuda
def test_videos_of_a_gpu_are_those_of_the_cpu(case, tmp_path, monkeypatch):
    want, got = (run_graph(case, tmp_path, monkeypatch, device) for device in ("cpu", "cuda"))
    assert len(want) == len(got) == len(case.videos)
    for one, other in zip(want, got, strict=True):
        assert psnr(pixels(one), pixels(other)) > LEAST_PSNR, other.name


def pixels(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def psnr(one, other):
    return 10 * np.log10(255**2 / max(((one - other) ** 2).mean(), 1e-9))
