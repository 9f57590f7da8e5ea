"""What a long run says while it goes on, and what it leaves when it cannot."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import talking
import torch
from PIL import Image
from talking import MOTION, TOTAL, WINDOW, request, run
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk import loop as talk
from wanvideo_wrapper.multitalk.pictures import keyframe
from wanvideo_wrapper.multitalk.plan import plan_windows
from wanvideo_wrapper.multitalk.window import WindowMaker
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.denoise import NotFiniteError
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.window_loop import TICKS

PLAIN = {"scheduler": "euler", "mode": "multitalk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


class Telling(StandaloneHost):
    """Notes every progress bar that is opened and all that they are told."""

    def __init__(self, **options):
        super().__init__(device="cpu", **options)
        self.bars, self.told = [], []

    def progress(self, total, label=""):
        bar = super().progress(total, label)
        self.bars.append((total, label))
        update = bar.update
        bar.update = lambda done, **named: self.told.append((done, named.get("note"))) or update(done, **named)
        return bar


def test_one_bar_tells_window_step_and_time_left(folder):
    host = Telling()
    sample(request(folder), host)
    windows = plan_windows(TOTAL, WINDOW, MOTION)
    assert host.bars == [(len(windows) * 3 * TICKS, "Sampling")]
    pattern = r"Sampling frames (\d+)-(\d+), window (\d) of 5, (?:step (\d) of 2|\d+ frames decoded), (.*)"
    told = [(done, re.fullmatch(pattern, note)) for done, note in host.told[:-1]]
    rows = [match.groups() for _, match in told]
    for number, window in enumerate(windows):
        mine = [row for row in rows if row[2] == str(number + 1)]
        assert {row[:2] for row in mine} == {(str(window.frames.start), str(window.frames.stop))}
        steps = [row[3] for row in mine]
        decoding = steps.index(None)
        assert steps[:decoding] == ["0", "1", "1", "2", "2"] and len(set(steps[decoding:])) == 1
        moved = {done for done, match in told if match[3] == str(number + 1) and "decoded" in match[0]}
        assert len(moved) > 1, "the bar moves while frames are decoded"
    assert rows[0][4] == "time left unknown" and all(re.fullmatch(r"\d+:\d\d:\d\d left", r[4]) for r in rows[3:])
    assert [done for done, _ in host.told] == sorted(done for done, _ in host.told)
    last, note = host.told[-1]
    assert last == host.bars[0][0] and re.fullmatch(r"Finished: 5 windows, \d:\d\d:\d\d", note)


def broken_model(asked, monkeypatch, window, step):
    """From that step of that window on, NaN in one place."""
    calls = []
    forward = type(asked.model.transformer).forward

    def bad(self, inputs):
        calls.append(None)
        out = forward(self, inputs)
        if len(calls) - 1 >= window * len(asked.schedule) + step:
            out[0, 0, 0, 0, 0] = float("nan")
        return out

    monkeypatch.setattr(type(asked.model.transformer), "forward", bad)


@pytest.fixture(scope="module")
def whole(folder):
    """The frames of a run that nothing happens to, in bytes."""
    return ((run(request(folder, **PLAIN))["video"] + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize(("window", "step"), [(0, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize("on_disk", [True, False])
def test_nan_stops_and_keeps_the_frames_before(folder, tmp_path, monkeypatch, whole, window, step, on_disk):
    asked = request(folder, **PLAIN, output_path=str(tmp_path / "a") if on_disk else "")
    broken_model(asked, monkeypatch, window, step)
    with pytest.raises(NotFiniteError) as caught:
        sample(asked, StandaloneHost(device="cpu", outputs=tmp_path / "output"))
    frames = plan_windows(TOTAL, WINDOW, MOTION)[window].frames
    said = str(caught.value)
    assert f"Window {window + 1} of 5 (frames {frames.start}-{frames.stop - 1})" in said
    assert f"step {step + 1} of 2" in said
    if window == 0:
        assert "no frames before it" in said
        return
    kept = 13 + 8 * (window - 1)
    place = re.search(rf"The {kept} frames before are in (\S+)\.\)", said)[1]
    files = sorted(Path(place).glob("*.png"))
    assert len(files) == kept
    for index in (0, kept - 1):
        assert np.array_equal(np.asarray(Image.open(files[index])), whole[index])


def test_black_frames_are_not_written(folder, tmp_path, monkeypatch):
    asked = request(folder, output_path=str(tmp_path / "a"))
    vae, decode, made = asked.image.loop.vae, asked.image.loop.vae.decode_chunks, []

    def black(latents, **options):
        for chunk in decode(latents, **options):
            made.append(chunk)
            yield torch.full_like(chunk, -1.0) if len(made) > 6 else chunk

    monkeypatch.setattr(vae, "decode_chunks", black)
    with pytest.raises(NotFiniteError, match=r"Window 2 of 5 .* black from frame 13 on .*13 frames before"):
        run(asked)
    assert len(list((tmp_path / "a").glob("*.png"))) == 13


def test_a_black_picture_may_give_black_frames(folder, monkeypatch):
    asked = request(folder, start_images=torch.full((3, 1, 32, 32), -1.0))
    decode = asked.image.loop.vae.decode_chunks
    dark = lambda latents, **o: (torch.full_like(chunk, -1.0) for chunk in decode(latents, **o))  # noqa: E731
    monkeypatch.setattr(asked.image.loop.vae, "decode_chunks", dark)
    assert run(asked)["video"].max() == -1


def test_out_of_memory_keeps_the_frames(folder, tmp_path, monkeypatch):
    asked = request(folder)
    forward, calls = type(asked.model.transformer).forward, []

    def full(self, inputs):
        calls.append(None)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, inputs)

    monkeypatch.setattr(type(asked.model.transformer), "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^Window 3 of 5 .*The GPU ran out.*The 21 frames before are in"):
        sample(asked, StandaloneHost(device="cpu", outputs=tmp_path))
    assert len(list(tmp_path.glob("*_unfinished/*.png"))) == 21


def test_out_of_memory_between_windows_keeps_the_frames(folder, tmp_path, monkeypatch):
    def full(self, window):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(WindowMaker, "hand_over", full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(request(folder), StandaloneHost(device="cpu", outputs=tmp_path))
    assert len(list(tmp_path.glob("*_unfinished/*.png"))) == 13


def test_motion_latents_of_a_first_window_are_those_of_its_condition(folder):
    asked = request(folder)
    vae, picture = asked.image.loop.vae, asked.image.loop.start_images
    for count in (1, 5):
        given = torch.rand(3, count, 32, 32) * 2 - 1 if count > 1 else picture
        whole = vae.encode(torch.cat((given, torch.zeros(3, 13 - count, 32, 32)), dim=1), quiet=True)
        assert torch.equal(whole[:, : (count + 3) // 4], vae.encode(given, quiet=True))


@pytest.mark.parametrize("base", ["base", "text"])
@pytest.mark.parametrize("mode", ["infinitetalk", "multitalk"])
def test_source_video_without_a_picture(folder, monkeypatch, base, mode):
    asked = request(folder, base=base, mode=mode, start_images=None)
    if base == "base":
        with pytest.raises(ValueError, match="connect start_image .* or an encoded source video"):
            run(asked)
    source = torch.rand(3, TOTAL - 1, 32, 32) * 2 - 1
    latents = asked.image.loop.vae.encode(source, quiet=True)
    seen, forward = [], type(asked.model.transformer).forward

    def spy(self, inputs):
        seen.append(talking.joined(self, inputs).latents[0])
        return forward(self, inputs)

    monkeypatch.setattr(type(asked.model.transformer), "forward", spy)
    video = run(replace(asked, samples={"samples": latents[None]}, add_noise_to_samples=True))["video"]
    assert video.shape == (TOTAL, 32, 32, 3) and video.isfinite().all()
    assert all(latents.shape[0] == (36 if base == "base" else 16) for latents in seen)
    if base == "base" and mode == "infinitetalk":
        decoded = asked.image.loop.vae.decode(latents, quiet=True).clamp(-1, 1)
        for number, window in enumerate(plan_windows(TOTAL, WINDOW, MOTION)):
            frame = decoded[:, window.frames.start : window.frames.start + 1]
            want = asked.image.loop.vae.encode(frame, quiet=True)
            got = seen[number * 2][20:, :1]
            if number == 0:
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
            assert (got - want).norm() / want.norm() < 0.3


def test_lora_strengths_by_the_step_start_over_in_every_window(folder, monkeypatch):
    asked = request(folder, lora=(0.0, 2.0), scheduler="euler")
    seen, step = [], type(asked.model).set_step
    monkeypatch.setattr(type(asked.model), "set_step", lambda self, i, **more: seen.append(i) or step(self, i, **more))
    video = run(asked)["video"]
    assert seen == [0, 1] * 5
    constant = [run(request(folder, lora=(s, s), scheduler="euler"))["video"] for s in (0.0, 2.0)]
    assert not any(torch.equal(video, other) for other in constant)


@pytest.mark.parametrize("reference", [None, 20, 60])
def test_skyreels_windows(folder, monkeypatch, reference):
    video = None if reference is None else torch.rand(3, reference, 32, 32) * 2 - 1
    asked = request(folder, mode="skyreelsv3", drop_frames=4, reference_video=video)
    encoded, encode = [], asked.image.loop.vae.encode
    monkeypatch.setattr(
        asked.image.loop.vae, "encode", lambda v, **o: encoded.append(v) or encode(v, **o), raising=True
    )
    assert run(asked)["video"].shape[0] == TOTAL
    windows = plan_windows(TOTAL, WINDOW, MOTION, 4)
    assert [w.frames.start for w in windows] == list(range(0, 33, 4)) and len(encoded) == len(windows)
    assert [w.kept for w in windows] == [9] * 8 + [13]
    for window, frames in zip(windows, encoded, strict=True):
        if video is None:
            assert frames[:, -5:].abs().max() == 0
            continue
        last = min(window.frames.stop, TOTAL) - 1
        index = last if reference >= TOTAL else round(last * (reference - 1) / (TOTAL - 1))
        assert all(torch.equal(frames[:, -n], video[:, index]) for n in range(1, 6))
        assert torch.equal(keyframe(asked.image.loop, window, TOTAL)[:, 0], video[:, index])


def test_skyreels_node(folder):
    from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N

    vae = request(folder).image.loop.vae
    embeds, path = N["WanVideoImageToVideoSkyreelsv3_audio"]().process(
        vae, 32, 32, 13, 5, 6, False, "reinhard_torch",
        start_image=torch.rand(1, 40, 40, 3), reference_video=torch.rand(7, 40, 40, 3),
    )  # fmt: skip
    loop = embeds.loop
    assert (loop.mode, loop.drop_frames, path) == ("skyreelsv3", 6, "")
    assert loop.reference_video.shape == (3, 7, 32, 32)
    assert talk.loop_settings(loop, "multitalk").drop_frames == 4
    with pytest.raises(ValueError, match="the 5 frames of the reference video no more"):
        talk.loop_settings(replace(loop, motion_frames=9, drop_frames=0), "multitalk")


def test_features_are_not_copied_whole(folder):
    (speech,) = request(folder, total=3000).payloads
    window = speech.window(Window((), tuple(range(2990, 3003)))).audio
    assert window.untyped_storage().nbytes() <= 13 * 5 * tiny.SPEECH_LAYERS * tiny.SPEECH_DIM * 4
