"""Many jobs: the file, the crew, what is kept and what is done again. Workers here are processes, not Ray's actors."""

import argparse
import json
import multiprocessing
import shutil
import signal
import sys

import crewed
import pytest
from crewed import Echo
from limits import PATIENCE
from wanvideo_wrapper.distributed.crew import LocalCrew
from wanvideo_wrapper.headless import attempts, batch
from wanvideo_wrapper.headless.attempts import Delivering
from wanvideo_wrapper.headless.batch import TRIES, entries, run_jobs, write_manifest
from wanvideo_wrapper.headless.job import Folders
from wanvideo_wrapper.headless.results import Results


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crew = LocalCrew(Delivering(Echo(tmp_path_factory.mktemp("crew"))), [{}])
    yield crew
    crew.close()


def jobs(folder, *lines, out=""):
    (folder / "graph.json").write_text("{}")
    rows = ({"workflow": "graph.json", **line} for line in lines)
    (folder / "jobs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return entries(folder / "jobs.jsonl", Results(out or str(folder / "out")), Folders())


def test_a_second_call_does_only_what_is_missing(tmp_path, crew):
    found = jobs(tmp_path, {"id": "one", "set": {"A.seed": 1}}, {"id": "two", "set": {"A.seed": 2}})
    run_jobs(found, crew)
    assert (tmp_path / "out/two/video.txt").read_text() == "A.seed=2"
    (tmp_path / "out/two/video.txt").unlink()
    before = (tmp_path / "out/one/result.json").stat().st_mtime_ns
    run_jobs(found, crew)
    assert (tmp_path / "out/two/video.txt").exists()
    assert (tmp_path / "out/one/result.json").stat().st_mtime_ns == before
    changed = jobs(tmp_path, {"id": "one", "set": {"A.seed": 3}}, {"id": "two", "set": {"A.seed": 2}})
    assert [entry.done() is None for entry in changed] == [True, False]
    write_manifest(changed, changed[0].results)
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [(row["id"], row["done"], row["files"]) for row in rows] == [
        ("one", False, []), ("two", True, ["two/video.txt"]),
    ]  # fmt: skip


def test_a_job_whose_worker_dies_is_done_again(tmp_path, crew):
    run_jobs(jobs(tmp_path, {"id": "die"}), crew)
    assert (tmp_path / "out/die/video.txt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_worker_that_died_between_jobs_is_replaced(tmp_path):
    crew, ends = LocalCrew(Echo(tmp_path), [{}]), []
    try:
        for job in ("one", "two", "two"):
            crew.begin(0, job)
            ends.append(crew.next())
            if job == "one":
                process, _ = crew._workers[0]
                process.kill()
                process.join()
    finally:
        crew.close()
    assert [(end.failure, end.again) for end in ends] == [(None, False), ("its process died", True), (None, False)]
    assert ends[2].shown[0].startswith("two ")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_after_the_death_of_the_driver_the_same_call_does_what_is_missing(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=crewed.drive, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    found = crewed.four_jobs(tmp_path)
    assert [entry.done() is None for entry in found] == [False, False, True, True]
    before = [(tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in ("one", "two")]
    crewed.drive(tmp_path)
    assert all((tmp_path / "out" / entry.name / "video.txt").exists() and entry.done() for entry in found)
    assert before == [(tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in ("one", "two")]


def test_of_a_try_that_was_given_up_only_unfinished_frames_are_taken_over(tmp_path):
    """Its own process, which may still run, can then publish nothing."""
    place = tmp_path / "one"
    before = attempts.begin(place)
    for name in ("res/a_output/.unfinished/run.json", "res/a_output/frame_00000.png", "res/b_output/frame_00000.png"):
        (before / name).parent.mkdir(parents=True, exist_ok=True)
        (before / name).write_text(name)
    (before / "video_00001.mp4").touch()
    folder = attempts.begin(place)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {attempts.OWNED}
    assert left == {"res/a_output/.unfinished/run.json", "res/a_output/frame_00000.png"}
    assert list(place.iterdir()) == [folder]
    (before / "sub").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="another worker has begun this job"):
        attempts.end(before)
    assert list(place.iterdir()) == [folder]
    attempts.end(folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_worker_that_outlives_its_driver_leaves_one_video(tmp_path):
    """The second driver's worker ends first, and the first driver's writes and ends behind it."""

    class Named:
        def __init__(self, name, meanwhile=lambda: None):
            self.name, self.meanwhile = name, meanwhile

        def run(self, job):
            (job.folders.outputs / f"{self.name}.png").touch()
            self.meanwhile()
            job.folders.outputs.mkdir(parents=True, exist_ok=True)
            (job.folders.outputs / f"{self.name}.mp4").touch()
            return []

    (entry,) = jobs(tmp_path, {"id": "one"})
    first = crewed.Here(Delivering(Named("first", lambda: run_jobs([entry], crewed.Here(Delivering(Named("second")))))))
    first.begin(0, attempts.Delivery(entry.name, entry.job, entry.results))
    assert "another worker has begun" in first.next().failure
    assert sorted(path.name for path in (tmp_path / "out/one").iterdir()) == ["result.json", "second.mp4", "second.png"]
    assert entry.done()["files"] == ["second.mp4", "second.png"]
    assert not [path for path in (tmp_path / "out/.unfinished").rglob("*") if path.is_file()]


def test_results_go_to_a_url(tmp_path):
    """By the worker, which alone sees the job's folder; the folder of a job that fails stays, as its frames may."""
    url = f"{(tmp_path / 'bucket').as_uri()}/videos"
    found = jobs(tmp_path, {"id": "one", "set": {"A.seed": 1}}, {"id": "bad"}, out=url)
    crew = LocalCrew(Delivering(Echo(tmp_path)), [{}])
    try:
        with pytest.raises(RuntimeError, match="1 of 2 jobs failed"):
            run_jobs(found, crew)
        kept = tmp_path / "bucket/videos"
        assert (kept / "one/video.txt").read_text() == "A.seed=1"
        assert json.loads((kept / "one/result.json").read_text())["files"] == ["video.txt"]
        local = found[0].results.folder
        assert not (local / "one").exists() and [path.name for path in (local / ".unfinished").iterdir()] == ["bad"]
        assert not (kept / "bad").exists()
        write_manifest(found, found[0].results)
        rows = [json.loads(line) for line in (kept / "manifest.jsonl").read_text().splitlines()]
        assert [(row["id"], row["files"]) for row in rows] == [("one", ["one/video.txt"]), ("bad", [])]
        assert [entry.done() is None for entry in found] == [False, True]
        (kept / "one/video.txt").unlink()
        assert found[0].done() is None
    finally:
        crew.close()
        shutil.rmtree(found[0].results.folder)


def test_a_url_of_a_kind_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="not known: floppy"):
        Results("floppy://videos")


def test_results_in_an_object_store(tmp_path):
    """A store without folders: whole objects under names."""
    results = Results("memory://videos")
    (results.folder / "one/sub").mkdir(parents=True)
    (results.folder / "one/sub/video.txt").write_text("frames")
    (results.folder / "one/temp").mkdir()
    (results.folder / "one/temp/x").touch()
    results.take("one", results.folder / "one")
    results.write("one/result.json", "{}")
    assert results.files("one") == ["result.json", "sub/video.txt"]
    assert results.read("one/sub/video.txt") == "frames" and not (results.folder / "one").exists()
    with pytest.raises(OSError):
        results.read("two/result.json")
    results.folder.rmdir()


def test_what_is_wrong_with_a_job_stays_wrong_and_the_others_end(tmp_path, crew, monkeypatch):
    begun, begin = [], crew.begin

    def noting(worker, job):
        begun.append(job.name)
        begin(worker, job)

    monkeypatch.setattr(crew, "begin", noting)
    with pytest.raises(RuntimeError, match="2 of 3 jobs failed.*\nbad: The file is of another kind") as error:
        run_jobs(jobs(tmp_path, {"id": "bad"}, {"id": "odd"}, {"id": "one"}), crew)
    assert "odd: RuntimeError: an illegal address" in str(error.value)
    assert (begun.count("bad"), begun.count("odd"), begun.count("one")) == (1, TRIES, 1)


def test_a_worker_takes_jobs_of_its_models_first(tmp_path, crew):
    lines = [{"id": f"{name}{number}", "set": {"ModelLoader.model": name}} for number in range(2) for name in "ab"]
    order = []

    class Noting:
        size = 1

        def begin(self, worker, job):
            order.append(job.name)
            crew.begin(worker, job)

        def next(self):
            return crew.next()

    run_jobs(jobs(tmp_path, *lines), Noting())
    assert order == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"workflow": 3}, "line 1: a job is an object with a 'workflow'"),
        ({"seed": 3}, "no keys but bypass, id, mute, set, workflow"),
        ({"id": "../x"}, "cannot be a folder's name"),
        ({"set": [1]}, "'set' is an object"),
    ],
)
def test_what_is_no_job_is_said_with_its_line(tmp_path, line, why):
    with pytest.raises(ValueError, match=why):
        jobs(tmp_path, line)


def test_two_jobs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: another job is called 'graph_"):
        jobs(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("seen", "each", "shares"),
    [(None, 1, ["0", "1", "2"]), ("4,7,GPU-1a", 1, ["4", "7", "GPU-1a"]), ("4,7,5", 2, ["4,7"])],
)
def test_workers_share_the_gpus_that_the_command_was_left(tmp_path, monkeypatch, seen, each, shares):
    given = []
    monkeypatch.setattr(batch, "LocalCrew", lambda work, environments: given.extend(environments))
    monkeypatch.setattr(batch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(batch.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    options = argparse.Namespace(device="auto", ray=None, gpus_per_job=each, workers=None)
    batch._crew(options, Results(str(tmp_path)))
    assert given == [{"CUDA_VISIBLE_DEVICES": share} for share in shares]


def test_a_gpu_of_a_number_is_refused_before_any_worker_starts(tmp_path):
    options = argparse.Namespace(device="cuda:1", ray=None, gpus_per_job=1, workers=None)
    with pytest.raises(ValueError, match="give --device cuda or cpu, not cuda:1"):
        batch._crew(options, Results(str(tmp_path)))


def test_without_ray_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    from wanvideo_wrapper.distributed.ray_crew import RayCrew

    with pytest.raises(ImportError, match=r"'ray', which is not installed: pip install"):
        RayCrew(Echo(tmp_path), address="local", gpus=0)
    assert batch.RESULT == "result.json"
