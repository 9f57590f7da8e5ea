"""A run that was broken off goes on where it stopped, and ends as if nothing had happened."""

import gc
import hashlib
import json
import multiprocessing
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import talking
import torch
from limits import PATIENCE
from talking import TOTAL, request, run
from wanvideo_wrapper.multitalk import loop as talk
from wanvideo_wrapper.multitalk.plan import plan_windows
from wanvideo_wrapper.multitalk.window import WindowMaker
from wanvideo_wrapper.wanvideo import footage as store

VAE = ["diffusers.models.autoencoders.autoencoder_kl_wan"]
STARTS = [w.frames.start for w in plan_windows(TOTAL, talking.WINDOW, talking.MOTION)]


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


@pytest.fixture
def sampled(monkeypatch):
    """Numbers of the windows that were sampled."""
    numbers, sample = [], WindowMaker._sample

    def seen(self, window, watcher):
        numbers.append(window.index)
        return sample(self, window, watcher)

    monkeypatch.setattr(WindowMaker, "_sample", seen)
    return numbers


def pictures(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def break_off(monkeypatch, asked, frame):
    """Run until that frame is about to be written."""
    write = store.write_frame

    def stopping(where, index, picture):
        if index == frame:
            raise StoppedError
        write(where, index, picture)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_frame", stopping)
        with pytest.raises(StoppedError):
            run(asked)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The pictures of a run that nothing happens to."""
    path = tmp_path_factory.mktemp("whole") / "a"
    run(request(folder, output_path=str(path)))
    return pictures(path)


def kill(folder, frame, mode, path):
    """In a process that is forked from one with the packages: each of them takes seconds to import."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["wanvideo_wrapper", "diffusers.schedulers", *VAE])
    options = {"mode": mode, "output_path": str(path)}
    process = server.Process(target=talking.killed_at, args=(frame, folder), kwargs=options)
    process.start()
    process.join(PATIENCE)
    return process.exitcode


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("mode", ["infinitetalk", "multitalk"])
def test_killed_in_a_middle_window(folder, tmp_path, sampled, mode):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(request(folder, mode=mode, output_path=str(whole)))
    want = pictures(whole)
    assert len(want) == TOTAL and sampled == [0, 1, 2, 3, 4]
    assert kill(folder, 24, mode, broken) == -signal.SIGKILL
    assert (broken / ".unfinished/run.json").is_file() and len(list(broken.glob("*.png"))) == 24
    sampled.clear()
    result = run(request(folder, mode=mode, output_path=str(broken)))
    assert sampled == [2, 3, 4]
    assert pictures(broken) == want and result["output_path"] == str(broken)


@pytest.mark.parametrize("frame", [0, 5, 13, 14, 41])
def test_broken_at_any_frame(folder, tmp_path, monkeypatch, whole, sampled, frame):
    asked = request(folder, output_path=str(tmp_path / "a"))
    break_off(monkeypatch, asked, frame)
    before = len(sampled)
    run(asked)
    finished = 0 if frame < 13 else 1 + (frame - 13) // 8
    assert before == finished + 1 and sampled[before:] == list(range(finished, 5))
    assert pictures(tmp_path / "a") == whole


@pytest.mark.parametrize("scheduler", ["er_sde", "rcm", "vibt_unipc"])
def test_noise_of_solvers_goes_on_where_it_was(folder, tmp_path, monkeypatch, sampled, scheduler):
    whole, broken = (request(folder, scheduler=scheduler, output_path=str(tmp_path / n)) for n in "ab")
    run(whole)
    break_off(monkeypatch, broken, 24)
    sampled.clear()
    run(broken)
    assert sampled == [2, 3, 4] and pictures(tmp_path / "b") == pictures(tmp_path / "a")


def test_the_folder_of_a_broken_run_takes_the_name_of_the_new_one(folder, tmp_path, monkeypatch, sampled):
    first, second, third = (tmp_path / f"2024010{n}_000000_auto_output" for n in range(3))
    break_off(monkeypatch, request(folder, output_path=str(first)), 20)
    sampled.clear()
    run(request(folder, output_path=str(second)))
    assert sampled == [1, 2, 3, 4] and not first.exists() and len(pictures(second)) == TOTAL
    sampled.clear()
    run(request(folder, output_path=str(third)))
    assert sampled == [0, 1, 2, 3, 4] and pictures(second) == pictures(third)


def changes(asked):
    loop, speech = asked.image.loop, asked.payloads[0]

    def with_loop(**fields):
        return replace(asked, image=replace(asked.image, loop=replace(loop, **fields)))

    yield "seed", replace(asked, seed=12)
    yield "cfg", replace(asked, cfg=(1.0, 1.5))
    yield "text", replace(asked, text=replace(asked.text, positive=(asked.text.positive[0] + 1e-3,)))
    yield "start_image", with_loop(start_images=loop.start_images * 0.99)
    yield "multitalk_embeds", replace(asked, payloads=(replace(speech, scale=1.1),))
    yield "multitalk_embeds", replace(asked, payloads=(replace(speech, features=(speech.features[0] * 1.01,)),))
    yield "window settings", with_loop(colormatch="mkl")
    yield "schedule", replace(asked, schedule=request_schedule(3))
    yield "samples", replace(asked, samples={"samples": torch.randn(1, 16, 8, 4, 4)})


def request_schedule(steps):
    from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

    return make_schedule(ScheduleSpec(name="dpm++_sde", steps=steps, shift=5.0))


def test_other_inputs_start_anew_and_are_named(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = request(folder)
    before = {name: talk.digest(part) for name, part in talk.fingerprint_parts(asked).items()}
    for name, other in changes(asked):
        after = {key: talk.digest(part) for key, part in talk.fingerprint_parts(other).items()}
        assert [key for key in before if before[key] != after[key]] == [name]
    named = request(folder, output_path=str(tmp_path / "a"))
    break_off(monkeypatch, named, 20)
    run(replace(named, seed=12))
    assert "has other inputs (seed)" in caplog.text
    assert len(pictures(tmp_path / "a")) == TOTAL and (tmp_path / "a_1/.unfinished/run.json").is_file()


def test_a_changed_file_starts_anew(folder, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"abc")
    before = talk.digest(path)
    path.write_bytes(b"abcd")
    assert talk.digest(path) != before
    with pytest.raises(TypeError, match="a object among its inputs"):
        talk.digest({"x": object()})


@pytest.mark.parametrize("damage", ["frame", "record", "state"])
def test_a_damaged_folder_is_not_continued(folder, tmp_path, monkeypatch, sampled, damage):
    path = tmp_path / "a"
    asked = request(folder, output_path=str(path))
    break_off(monkeypatch, asked, 30)
    inner = path / ".unfinished"
    victim = {"frame": path / "frame_00003.png", "record": inner / "run.json", "state": next(inner.glob("window_*"))}
    victim[damage].write_bytes(b"")
    sampled.clear()
    run(asked)
    assert sampled == [0, 1, 2, 3, 4] and len(pictures(path)) == TOTAL


def test_two_processes_do_not_share_a_folder(folder, tmp_path):
    path = tmp_path / "a"
    other = store.FolderFootage(path, 3, {})
    other.open()
    with pytest.raises(ValueError, match="Another process is writing"):
        run(request(folder, output_path=str(path)))
    other.close()


def test_the_record_is_small_and_readable(folder, tmp_path, monkeypatch):
    break_off(monkeypatch, request(folder, output_path=str(tmp_path / "a")), 20)
    record = json.loads((tmp_path / "a/.unfinished/run.json").read_text())
    assert (record["windows"], record["frames"]) == (1, 13)
    assert len(list((tmp_path / "a/.unfinished").glob("window_*"))) == 1


def test_memory_does_not_grow_with_the_length(folder, tmp_path, monkeypatch, new_objects):
    """No window leaves a tensor behind; benchmarks/long_video_memory.py measures the process."""
    alive, sample = [], WindowMaker._sample

    def counted(self, window, watcher):
        gc.collect()
        alive.append(sum(found.untyped_storage().nbytes() for found in gc.get_objects() if type(found) is torch.Tensor))
        return sample(self, window, watcher)

    monkeypatch.setattr(WindowMaker, "_sample", counted)
    run(request(folder, output_path=str(tmp_path / "a")))
    assert len(alive) == 5 and alive[2] == alive[3] == alive[4]
