"""The crew of Ray's actors on a cluster that is started here."""

from pathlib import Path

import pytest
from crewed import Echo

pytest.importorskip("ray", reason="needs the package ray")

from wanvideo_wrapper.distributed.ray_crew import RayCrew


def test_actors_do_jobs_and_are_replaced_when_they_die(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
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
