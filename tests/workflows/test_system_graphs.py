"""Saved graphs of systems run headless to videos, with tiny models under the file names that they use."""

import sys

import pytest
from foreign_nodes import run_graph
from system_graphs import Files, all_cases, assert_made

CASES = all_cases()


@pytest.mark.parametrize("name", CASES)
def test_graph_runs_to_its_videos(name, tmp_path, monkeypatch):
    case = CASES[name]
    if not case.path.is_file():
        pytest.skip(f"no {case.path} (set WANVIDEO_GRAPHS)")
    case.fill(Files(tmp_path))
    for module, make in case.modules.items():
        monkeypatch.setitem(sys.modules, module, make())
    assert_made(case, run_graph(case, tmp_path, monkeypatch))
