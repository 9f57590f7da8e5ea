"""Disks and memory without room: what is finished stays, and what went wrong first is what is told."""


from contextlib import contextmanager

import pytest
import talking
import torch
from safetensors.torch import load_file
from talking import request, run
from wanvideo_wrapper.headless.rescue import rescue
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo import footage as store
from wanvideo_wrapper.wanvideo.footage import FolderFootage, MemoryFootage
from wanvideo_wrapper.wanvideo.images import to_unit
from wanvideo_wrapper.wanvideo.safetensors_file import write_tensors
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.text_cache import TextCache

resource = pytest.importorskip("resource")


@contextmanager
def files_end_at(size):
    """As on a full disk, no file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


def test_a_window_that_cannot_be_recorded_is_one_sentence_and_goes_on_later(tmp_path):
    inputs = {"model": "a"}
    footage = FolderFootage(tmp_path / "x_output", 20, inputs)
    footage.open()
    footage.add(torch.rand(3, 16, 16, 3))
    footage.finish_window(1, {"motion": torch.rand(4)})
    footage.add(torch.rand(2, 16, 16, 3))
    with files_end_at(2000), pytest.raises(OSError, match="Window 2 could not be recorded.*run again to go on"):
        footage.finish_window(2, {"motion": torch.rand(4000)})
    footage.close()
    assert not list((tmp_path / "x_output").rglob("*.part"))
    again = FolderFootage(tmp_path / "x_output", 20, inputs)
    done, handover = again.open()
    again.close()
    assert (done, again.frames, len(handover["motion"])) == (1, 3, 4)


def test_frames_that_can_be_saved_nowhere_do_not_hide_what_went_wrong(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    asked = request(folder)
    decode = asked.image.loop.vae.decode_chunks
    seen = []

    def breaking(latents, **options):
        for chunk in decode(latents, **options):
            seen.append(1)
            yield chunk * float("nan") if len(seen) > 5 else chunk

    monkeypatch.setattr(asked.image.loop.vae, "decode_chunks", breaking)
    with files_end_at(200), pytest.raises(ValueError, match=r"NaN.*could not be saved: Frame 0 could not"):
        sample(asked, StandaloneHost(outputs=tmp_path / "out", device="cpu"))
    assert not list(tmp_path.rglob("frame_*"))


def test_a_video_that_memory_cannot_hold_is_refused_before_sampling(folder, monkeypatch, tmp_path):
    needed = talking.TOTAL * 32 * 32 * 3 * 5
    asked = request(folder)
    monkeypatch.setattr(store, "_main_memory", lambda: needed - 1)
    monkeypatch.setattr(type(asked.model.transformer), "forward", lambda *_: pytest.fail("it was sampled"))
    with pytest.raises(ValueError, match="42 frames of 32x32 take.*set output_path"):
        run(asked)
    store.check_room(talking.TOTAL - 1, 32, 32, remedy="")
    monkeypatch.setattr(store, "_main_memory", lambda: None)
    store.check_room(10**9, 32, 32, remedy="")


def test_latents_that_do_not_fit_are_told_of(tmp_path, monkeypatch):
    for name in ("gettempdir",):
        monkeypatch.setattr(f"wanvideo_wrapper.headless.rescue.tempfile.{name}", lambda: str(tmp_path / "temp"))
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    with files_end_at(1000):
        note = rescue({"samples": {"samples": torch.rand(1, 16, 4, 8, 8)}}, tmp_path / "out")
    assert "could not be saved either" in note and not list(tmp_path.rglob("*.latent"))


def test_a_cache_without_room_costs_nothing_but_time(tmp_path, caplog):
    cache = TextCache(tmp_path / "cache")
    with files_end_at(1000):
        cache.save("a", "t5", torch.rand(64, 64))
    assert "is not kept" in caplog.text and cache.load("a", "t5") is None
    assert not list(tmp_path.rglob("*.part"))


def test_tensors_are_written_whole(tmp_path):
    tensors = {"a": torch.rand(3, 4).t(), "b": torch.arange(5)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "x.safetensors").items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_frames_come_out_in_one_copy_and_the_footage_is_8_bit():
    images = torch.rand(6, 8, 8, 3)
    footage = MemoryFootage(6)
    for part in images.split(2):
        footage.add(part)
    assert footage._video.dtype == torch.uint8
    video = footage.video()
    assert (to_unit(video) - images).abs().max() <= 0.5 / 255 + 1e-6
    assert footage._video is None
    assert torch.equal(to_unit(torch.tensor([-1.5, 0.0, 2.0])), torch.tensor([0.0, 0.5, 1.0]))
