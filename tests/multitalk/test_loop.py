"""The window loop on a tiny model: what windows cover, what they hand on, what the user gets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import CancelledError, StandaloneHost
from wanvideo_wrapper.multitalk import drift, plan
from wanvideo_wrapper.multitalk import loop as talk
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.loop import TalkingLoop
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.window_loop import TICKS

WINDOW, MOTION = 13, 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    host = StandaloneHost(device="cpu")
    clip = (ClipImageExtension(clip_dim=16),)
    tiny.transformer(in_dim=36, extensions=clip, layers=3).save(folder / "base.safetensors", torch.float32)
    tiny.speech_module().save(folder / "infinite.safetensors", torch.float32)
    tiny.vae(base_dim=4).save(folder / "vae.safetensors", torch.float32)
    options = LoadOptions(base_dtype=torch.float32, modules=(ModuleFile(folder / "infinite.safetensors"),))
    model = load_wan_model(folder / "base.safetensors", options, host, SYSTEMS)
    return model, load_vae(folder / "vae.safetensors", dtype=torch.float32, host=host), host


def request(parts, total=30, **loop):
    model, vae, _ = parts
    generator = torch.Generator().manual_seed(3)
    settings = TalkingLoop(
        vae=vae, width=32, height=32, window_frames=WINDOW, motion_frames=MOTION, mode="infinitetalk",
        start_images=torch.rand(3, 1, 32, 32, generator=generator) * 2 - 1,
    )  # fmt: skip
    settings = replace(settings, **loop)
    features = torch.randn(total, tiny.SPEECH_LAYERS, tiny.SPEECH_DIM, generator=generator)
    return SampleRequest(
        model=model,
        text=TextEmbeds(positive=(torch.randn(4, tiny.TEXT_DIM, generator=generator),)),
        image=ImageEmbeds(latent_shape=(16, 4, 4, 4), num_frames=WINDOW, loop=settings),
        schedule=make_schedule(ScheduleSpec(name="euler", steps=2, shift=5.0)),
        cfg=1.0,
        seed=11,
        payloads=(MultiTalkEmbeds(features=(features,), silence=features[:3]),),
    )


def part_of(window):
    return Window(latents=window.latents, pixels=tuple(window.frames), end=8)


@pytest.mark.parametrize(
    ("total", "size", "motion"), [(5, 13, 5), (13, 13, 5), (14, 13, 5), (100, 81, 25), (500, 81, 9)]
)
def test_windows_cover_every_frame_and_share_the_motion(total, size, motion):
    windows = plan.plan_windows(total, size, motion)
    assert windows[0].frames.start == 0 and all(len(w.frames) == size for w in windows)
    assert windows[-1].frames.stop >= total
    assert len(windows) == 1 or windows[-2].frames.stop < total
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.frames.stop - after.frames.start == motion


@pytest.mark.parametrize("total", [7, 13, 30])
def test_video_is_as_long_as_the_speech_and_repeats_exactly(parts, total):
    video = sample(request(parts, total), parts[2])[0]["video"]
    assert video.shape == (total, 32, 32, 3) and video.isfinite().all()
    assert video.min() >= -1 and video.max() <= 1
    assert torch.equal(sample(request(parts, total), parts[2])[0]["video"], video)
    other = sample(replace(request(parts, total), seed=12), parts[2])[0]["video"]
    assert not torch.equal(other, video)


def test_motion_frames_are_in_place_at_every_step(parts, monkeypatch):
    seen, encoded = [], []
    model, vae, host = parts
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda video, **o: encoded.append((video, real(video, **o))) or encoded[-1][1])
    forward = type(model.transformer).forward

    def spy(self, inputs):
        seen.append((inputs.latents[0, :16].clone(), inputs.payloads))
        return forward(self, inputs)

    monkeypatch.setattr(type(model.transformer), "forward", spy)
    sample(request(parts, 30), host)
    windows = plan.plan_windows(30, WINDOW, MOTION)
    assert len(seen) == 2 * len(windows)
    # The first window's motion is the picture alone, which the VAE encodes like the first frame of the condition.
    motions = [real(request(parts, 30).image.loop.start_images, quiet=True)]
    motions += [latents for video, latents in encoded if video.shape[1] == MOTION]
    for call, (latents, payloads) in enumerate(seen):
        motion = motions[call // 2]
        assert motion.shape[1] == (1 if call < 2 else 2)
        torch.testing.assert_close(latents[:, : motion.shape[1]], motion)
        want = request(parts, 30).payloads[0].window(part_of(windows[call // 2])).audio
        assert torch.equal(next(p for p in payloads if hasattr(p, "audio")).audio, want)


def test_next_window_starts_from_the_last_frames_of_the_one_before(parts, monkeypatch):
    model, vae, host = parts
    decoded, encoded = [], []
    encode, decode = vae.encode, vae.decode_chunks
    monkeypatch.setattr(vae, "encode", lambda video, **o: encoded.append(video) or encode(video, **o))

    def seen(latents, **options):
        chunks = list(decode(latents, **options))
        decoded.append(torch.cat(chunks, dim=1))
        return iter(chunks)

    monkeypatch.setattr(vae, "decode_chunks", seen)
    sample(request(parts, 30), host)
    motions = [video for video in encoded if video.shape[1] == MOTION]
    for before, motion in zip(decoded, motions, strict=False):
        torch.testing.assert_close(motion, before[:, -MOTION:].clamp(-1, 1), atol=1e-5, rtol=0)


def test_frames_go_to_disk_as_windows_finish(parts, tmp_path):
    result = sample(request(parts, 30, output_path=str(tmp_path / "frames")), parts[2])[0]
    assert result["output_path"] == str(tmp_path / "frames")
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files] == [f"frame_{i:05d}.png" for i in range(30)]
    kept = sample(request(parts, 30), parts[2])[0]["video"]
    for frame in (0, 12, 13, 29):
        want = ((kept[frame] + 1) * 127.5).round().to(torch.uint8).numpy()
        assert np.array_equal(np.asarray(Image.open(files[frame])), want)


def test_earlier_frames_are_set_aside(parts, tmp_path):
    folder = tmp_path / "frames"
    for total, others in ((26, []), (9, [26]), (17, [9, 26])):
        sample(request(parts, total=total, output_path=str(folder)), parts[2])
        assert len(list(folder.glob("*.png"))) == total
        aside = [len(list(path.glob("*.png"))) for path in tmp_path.iterdir() if path != folder]
        assert sorted(aside) == others


def test_windows_share_the_encoded_picture(parts, monkeypatch):
    asked = request(parts, total=30)
    encode, lengths = asked.image.loop.vae.encode, []

    def seen(video, **options):
        lengths.append(video.shape[1])
        return encode(video, **options)

    monkeypatch.setattr(asked.image.loop.vae, "encode", seen)
    sample(asked, parts[2])
    assert len(lengths) > 2 and lengths.count(asked.image.loop.window_frames) == 1


def test_cancel_in_the_middle_leaves_whole_windows(parts, tmp_path):
    class Impatient(StandaloneHost):
        steps = 0

        def check_cancelled(self):
            super().check_cancelled()

        def progress(self, total, label=""):
            bar, host = super().progress(total, label), self
            update = bar.update

            def counted(done, **options):
                update(done, **options)
                # In the second window: the first one's two steps and its decoding are three parts.
                if done > 3 * TICKS:
                    host.cancel.set()

            bar.update = counted
            return bar

    host = Impatient(device="cpu")
    with pytest.raises(CancelledError):
        talk.run_loop(request(parts, 30, output_path=str(tmp_path)), host)
    assert len(list(tmp_path.glob("*.png"))) == WINDOW and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("mode", ["multitalk", "infinitetalk", "auto"])
@pytest.mark.parametrize("colormatch", ["disabled", "mkl"])
def test_modes_and_colour_match(parts, mode, colormatch):
    video = sample(request(parts, 20, mode=mode, colormatch=colormatch), parts[2])[0]["video"]
    assert video.shape[0] == 20 and video.isfinite().all()
    infinite = sample(request(parts, 20, colormatch=colormatch), parts[2])[0]["video"]
    assert torch.equal(video, infinite) == (mode != "multitalk")


def test_drift_of_a_long_video_is_said(parts, caplog, monkeypatch):
    monkeypatch.setattr(drift, "LONG", 19)
    base = request(parts, 20)
    sample(base, parts[2])
    assert "drift" not in caplog.text
    sample(replace(base, model=replace(base.model, path=Path("FusionX_I2V.safetensors"))), parts[2])
    assert "FusionX_I2V.safetensors lets colours and the face drift" in caplog.text


def test_two_speakers(parts):
    base = request(parts, 20)
    features = (base.payloads[0].features[0], torch.randn(20, tiny.SPEECH_LAYERS, tiny.SPEECH_DIM))
    two = replace(base, payloads=(replace(base.payloads[0], features=features),))
    assert not torch.equal(sample(two, parts[2])[0]["video"], sample(base, parts[2])[0]["video"])


def test_video_to_video_starts_from_its_latents(parts):
    latents = torch.randn(1, 16, 3, 4, 4)
    schedule = make_schedule(ScheduleSpec(name="euler", steps=4, shift=5.0, start_step=2))
    base = replace(request(parts, 20), schedule=schedule, samples={"samples": latents}, add_noise_to_samples=True)
    video = sample(base, parts[2])[0]["video"]
    assert video.shape[0] == 20 and not torch.equal(video, sample(request(parts, 20), parts[2])[0]["video"])
    with pytest.raises(ValueError, match="encode the source video at the width and height"):
        sample(replace(base, samples={"samples": torch.randn(1, 16, 3, 8, 8)}), parts[2])


def test_missing_inputs_are_named(parts):
    good = request(parts, 20)
    for change, says in [
        ({"payloads": ()}, "connect multitalk_embeds"),
        ({"text": None}, "connect text_embeds"),
        ({"image": replace(good.image, loop=replace(good.image.loop, start_images=None))}, "connect start_image"),
        ({"image": replace(good.image, loop=replace(good.image.loop, motion_frames=13))}, "must be less than"),
    ]:
        with pytest.raises(ValueError, match=says):
            sample(replace(good, **change), parts[2])


def test_frame_counts_are_rounded_to_what_the_vae_encodes(parts):
    settings = plan.loop_settings(request(parts, 20, window_frames=16, motion_frames=8).image.loop, "multitalk")
    assert (settings.window_frames, settings.motion_frames) == (13, 5)
