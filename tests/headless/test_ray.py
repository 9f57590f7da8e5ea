"""The crew of Ray's actors on a cluster that is started here, and the demo of one."""

import json
from pathlib import Path

import pytest
import small_cluster
from crewed import Echo
from import_path import import_path
from wanvideo_wrapper.headless import batch
from wanvideo_wrapper.headless.cli import main

pytest.importorskip("ray", reason="needs the package ray")

from wanvideo_wrapper.distributed.ray_crew import RayCrew


def test_actors_do_jobs_and_are_replaced_when_they_die(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(Path(__file__).parents[1]))
    crew = RayCrew(Echo(tmp_path), address="local", gpus=0, workers=1)
    ends = []
    try:
        for job in ("one", "die", "die", "bad", "two"):
            crew.begin(0, job)
            ends.append(crew.next())
    finally:
        crew.close()
    assert "worker or machine died" in ends[1].failure
    assert [(end.failure is None, end.again) for end in ends] == [
        (True, False), (False, True), (True, False), (False, False), (True, False),
    ]  # fmt: skip
    assert ends[3].failure == "The file is of another kind."
    first, again, last = (ends[index].shown[0].split() for index in (0, 2, 4))
    assert first[1] != again[1] == last[1]


@pytest.mark.slow
def test_the_cluster_demo_makes_four_talking_videos_and_a_second_call_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(small_cluster.ROOT)
    jobs, names = small_cluster.write_jobs(tmp_path)
    command = small_cluster.command(jobs, tmp_path / "out")
    assert command[2:4] == ["--ray", "local"] and len(names) == 4
    assert main(command) == 0
    made = small_cluster.videos(tmp_path / "out", names)
    assert [video.shape for video in made] == [(small_cluster.FRAMES, 64, 64, 3)] * 4
    assert all(video.std() > 10 for video in made)
    assert len({video.tobytes() for video in made}) == 4
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [(row["id"], row["done"], len(row["files"])) for row in rows] == [(name, True, 1) for name in names]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("talking_*/*")}
    monkeypatch.setattr(batch, "_crew", None)
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("talking_*/*")} == before
