"""What the model sees in every window: pictures, prompts, source video, noise masks, re-noised motion frames."""

from dataclasses import replace

import numpy as np
import pytest
import talking
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk import plan
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.loop import TalkingLoop
from wanvideo_wrapper.multitalk.motion import NoisedMotion
from wanvideo_wrapper.multitalk.window import _masks_of
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.uni3c.extension import Uni3CArgs
from wanvideo_wrapper.wanvideo import window_loop
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

WINDOW, MOTION, STEPS, TOTAL = 13, 5, 3, 26
LATENTS = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    host = StandaloneHost(device="cpu")
    tiny.transformer(in_dim=36, layers=3).save(folder / "base.safetensors", torch.float32)
    tiny.speech_module().save(folder / "infinite.safetensors", torch.float32)
    tiny.vae(base_dim=4).save(folder / "vae.safetensors", torch.float32)
    options = LoadOptions(base_dtype=torch.float32, modules=(ModuleFile(folder / "infinite.safetensors"),))
    model = load_wan_model(folder / "base.safetensors", options, host, SYSTEMS)
    return model, load_vae(folder / "vae.safetensors", dtype=torch.float32, host=host), host


def request(parts, *, pictures=1, prompts=1, mode="infinitetalk", schedule=None, **others):
    model, vae, _ = parts
    generator = torch.Generator().manual_seed(int(torch.randint(10000, ())))
    settings = TalkingLoop(
        vae=vae, width=32, height=32, window_frames=WINDOW, motion_frames=MOTION, mode=mode,
        start_images=torch.rand(3, pictures, 32, 32, generator=generator) * 2 - 1,
    )  # fmt: skip
    features = torch.randn(TOTAL, tiny.SPEECH_LAYERS, tiny.SPEECH_DIM, generator=generator)
    return SampleRequest(
        model=model,
        text=TextEmbeds(positive=tuple(torch.randn(4, tiny.TEXT_DIM, generator=generator) for _ in range(prompts))),
        image=ImageEmbeds(latent_shape=(16, LATENTS, 4, 4), num_frames=WINDOW, loop=settings),
        schedule=schedule or make_schedule(ScheduleSpec(name="euler", steps=STEPS, shift=5.0)),
        cfg=1.0,
        seed=11,
        payloads=(MultiTalkEmbeds(features=(features,), silence=features[:3]),),
        **others,
    )


@pytest.fixture
def run(parts, monkeypatch):
    """Runs a request: (inputs of every model call, final latents and frames of every window)."""
    model, vae, host = parts
    forward, decode = type(model.transformer).forward, vae.decode_chunks

    def start(asked):
        calls, windows = [], []

        def spy(self, inputs):
            calls.append(talking.joined(self, inputs))
            return forward(self, inputs)

        def seen(latents, **options):
            chunks = list(decode(latents, **options))
            windows.append((latents, torch.cat(chunks, dim=1)))
            return iter(chunks)

        monkeypatch.setattr(type(model.transformer), "forward", spy)
        monkeypatch.setattr(vae, "decode_chunks", seen)
        result = sample(asked, host)[0]
        assert result["video"].shape[0] == TOTAL and len(windows) == 3
        assert len(calls) == 3 * len(asked.schedule)
        return calls, windows

    return start


def expected_channels(vae, given):
    """Mask and encoded frames of `given` [3, n, H, W] and grey, one frame after the other."""
    video = torch.zeros(3, WINDOW, 32, 32)
    mask = torch.zeros(4, LATENTS, 4, 4)
    for frame in range(given.shape[1]):
        video[:, frame] = given[:, frame]
        mask[:, (frame + 3) // 4] = 1
    return torch.cat((mask, vae.encode(video)))


@pytest.mark.parametrize("pictures", [1, 2, 5])
def test_infinitetalk_shows_the_picture_of_the_window(parts, run, pictures):
    asked = request(parts, pictures=pictures)
    calls, _ = run(asked)
    for number, call in enumerate(calls):
        index = min(number // STEPS, pictures - 1)
        want = expected_channels(parts[1], asked.image.loop.start_images[:, index : index + 1])
        torch.testing.assert_close(call.latents[0, 16:], want)


def seeded_noise(seed):
    """Of the first window: a seed's first draw is no window's."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, LATENTS, 4, 4, generator=generator) for _ in range(2)][1]


def test_a_seed_gives_the_noise_of_saved_graphs(parts, run, monkeypatch):
    monkeypatch.setattr(window_loop, "PIECE", 160)
    calls, _ = run(request(parts))
    torch.testing.assert_close(calls[0].latents[0, :16, 1:], seeded_noise(11)[:, 1:], rtol=0, atol=0)


def test_a_schedule_that_begins_below_noise_alone_scales_it(parts, run):
    calls, _ = run(request(parts, schedule=make_schedule(ScheduleSpec(name="rcm", steps=1, shift=5.0))))
    torch.testing.assert_close(calls[0].latents[0, :16, 1:], seeded_noise(11)[:, 1:] * 120 / 121)


def test_infinitetalk_keeps_the_motion_to_the_end(parts, run):
    asked = request(parts)
    calls, windows = run(asked)
    for number, (latents, _) in enumerate(windows):
        size = 1 if number == 0 else 2
        motion = calls[number * STEPS].latents[0, :16, :size]
        torch.testing.assert_close(latents[:, :size], motion)


def test_multitalk_shows_and_renoises_the_motion(parts, run):
    asked = request(parts, mode="multitalk")
    calls, windows = run(asked)
    sigmas = asked.schedule.sigmas
    for number in (1, 2):
        motion = windows[number - 1][1][:, -MOTION:].clamp(-1, 1)
        clean = parts[1].encode(motion)
        torch.testing.assert_close(windows[number][0][:, :2], clean)
        drawn = []
        for step in range(STEPS):
            latents = calls[number * STEPS + step].latents[0]
            torch.testing.assert_close(latents[16:], expected_channels(parts[1], motion), atol=1e-5, rtol=1e-4)
            drawn.append((latents[:16, :2] - (1 - sigmas[step]) * clean) / sigmas[step])
        noise = torch.stack(drawn).flatten(1)
        assert noise.mean().abs() < 0.15 and (noise.std() - 1).abs() < 0.15
        overlap = torch.corrcoef(noise) - torch.eye(STEPS)
        assert overlap.abs().max() < 0.25


def test_each_window_has_its_prompt_and_the_last_one_stays(parts, run):
    asked = request(parts, prompts=2)
    calls, _ = run(asked)
    for number, call in enumerate(calls):
        assert torch.equal(call.text[0], asked.text.positive[min(number // STEPS, 1)])


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("length", [3, 7, 12])
def test_source_video_goes_along_with_the_windows(parts, run, length, noised):
    source = torch.randn(1, 16, length, 4, 4)
    schedule = make_schedule(ScheduleSpec(name="euler", steps=STEPS, shift=5.0, start_step=1))
    asked = request(parts, schedule=schedule, samples={"samples": source}, add_noise_to_samples=noised)
    calls, _ = run(asked)
    sigma = schedule.sigmas[0]
    for number, window in enumerate(plan.plan_windows(TOTAL, WINDOW, MOTION)):
        latents = calls[number * (STEPS - 1)].latents[0, :16]
        kept = 1 if number == 0 else 2
        for place in range(kept, LATENTS):
            clean = source[0, :, min(window.frames.start // 4 + place, length - 1)]
            if not noised:
                torch.testing.assert_close(latents[:, place], clean)
                continue
            noise = (latents[:, place] - (1 - sigma) * clean) / sigma
            assert noise.mean().abs() < 0.3 and (noise.std() - 1).abs() < 0.3


def test_what_is_given_is_as_noisy_as_the_model_is_told(parts, run):
    """Timesteps of multistep solvers are rounded down, and so is the noise of source video and motion frames."""
    schedule = make_schedule(ScheduleSpec(name="unipc", steps=7, shift=5.0, start_step=5))
    told = [*(schedule.timesteps / 1000).tolist(), 0.0]
    assert all(level < sigma - 1e-4 for level, sigma in zip(told[:2], schedule.sigmas, strict=False))
    source = torch.randn(1, 16, LATENTS, 4, 4)
    calls, _ = run(request(parts, schedule=schedule, samples={"samples": source}, add_noise_to_samples=True))
    want = told[0] * seeded_noise(11) + (1 - told[0]) * source[0]
    torch.testing.assert_close(calls[0].latents[0, :16, 1:], want[:, 1:], rtol=0, atol=1e-6)
    motion, latents = torch.randn(16, 2, 4, 4), torch.randn(16, LATENTS, 4, 4)
    drawn, seeded = (torch.Generator().manual_seed(3) for _ in range(2))
    hook = NoisedMotion(motion, schedule, drawn)
    placed = (hook.before(latents, 0), hook.after(latents, 0), hook.after(latents, 1))
    for level, got in zip(told, placed, strict=True):
        want = level * torch.randn(motion.shape, generator=seeded) + (1 - level) * motion
        torch.testing.assert_close(got, torch.cat((want, latents[:, 2:]), dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masks", [1, TOTAL + 3])
def test_noise_mask_keeps_the_source_video(parts, run, masks):
    source = torch.randn(1, 16, 8, 4, 4)
    mask = torch.zeros(masks, 32, 32)
    mask[:, :, 16:] = 1
    samples = {"samples": source, "noise_mask": mask}
    calls, windows = run(request(parts, samples=samples, add_noise_to_samples=True))
    free = []
    for number, window in enumerate(plan.plan_windows(TOTAL, WINDOW, MOTION)):
        latents = windows[number][0]
        kept = 1 if number == 0 else 2
        for place in range(kept, LATENTS):
            clean = source[0, :, min(window.frames.start // 4 + place, 7)]
            torch.testing.assert_close(latents[:, place, :, 0], clean[:, :, 0])
            free.append((latents[:, place, :, 3] - clean[:, :, 3]).abs().mean())
        torch.testing.assert_close(latents[:, :kept], calls[number * STEPS].latents[0, :16, :kept])
    assert min(free) > 0.05


def test_noise_mask_frames_belong_to_their_window():
    mask = torch.arange(7.0)[:, None, None].expand(7, 2, 2)
    assert _masks_of(mask, range(5, 10))[:, 0, 0].tolist() == [5, 6, 0, 1, 2]
    assert _masks_of(mask[:1, None], range(3)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"payloads": (Uni3CArgs(None, torch.randn(1, 16, 6, 4, 4)),)}, "Uni3C has 6 frames but the video needs 7"),
        ({"schedule": make_schedule(ScheduleSpec(name="euler", steps=3, shift=5.0, end_step=2))}, "of the 3 steps"),
        ({"samples": {"samples": torch.randn(1, 16, 4, 4, 4), "video": torch.randn(9, 8, 8, 3)}}, "last window's"),
    ],
)
def test_what_later_windows_would_lack_is_told_before_the_first(parts, monkeypatch, change, says):
    asked = request(parts)
    calls = []
    monkeypatch.setattr(type(parts[0].transformer), "forward", lambda *_: calls.append(1))
    monkeypatch.setattr(parts[1], "encode", lambda *_, **__: calls.append(1))
    change = {**change, "payloads": (*asked.payloads, *change.get("payloads", ()))}
    with pytest.raises(ValueError, match=says):
        sample(replace(asked, **change), parts[2])
    assert not calls


def test_the_vae_of_another_model_is_refused_before_the_first_window(parts, monkeypatch):
    """As of the 5B model, whose latents are half as large."""
    calls = []
    monkeypatch.setattr(type(parts[1]), "latent_channels", 48)
    monkeypatch.setattr(parts[1], "encode", lambda *_, **__: calls.append(1))
    with pytest.raises(ValueError, match="^The VAE makes latents of 48 channels but the model predicts 16: connect"):
        sample(request(parts), parts[2])
    assert not calls


def test_pictures_on_disk_replace_the_video(parts, tmp_path):
    asked = request(parts)
    loop = replace(asked.image.loop, output_path=str(tmp_path / "a" / "b"))
    result = sample(replace(asked, image=replace(asked.image, loop=loop)), parts[2])[0]
    assert result["video"].shape == (1, 64, 64, 3) and np.all(result["video"].numpy() == -1)
    assert len(list((tmp_path / "a" / "b").glob("frame_*.png"))) == TOTAL
