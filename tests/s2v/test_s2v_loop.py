"""The loop over windows: what each one sees, the frames that come out, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from float64_wan import rand
from PIL import Image
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import CancelledError, StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.s2v import loop as module
from wanvideo_wrapper.s2v.extension import SpeechInjection, SpeechToVideo
from wanvideo_wrapper.s2v.loop import SpeechLoop
from wanvideo_wrapper.uni3c.extension import Uni3CArgs
from wanvideo_wrapper.wanvideo.denoise import NotFiniteError
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

HOST = StandaloneHost(device="cpu")
SIZES = SpeechInjection(layers=3, audio_dim=8, tokens=4, pose_dim=16)
# 16 frames follow on 9: four latents on three.
WINDOW, PAST = 16, 9
EIGHT_BITS = 1 / 255 + 1e-4


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s2v")
    tiny.transformer(in_dim=16, extensions=(SIZES,)).save(folder / "s2v.safetensors", torch.float32)
    tiny.vae(base_dim=4).save(folder / "vae.safetensors", torch.float32)
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=HOST)
    model = load_wan_model(folder / "s2v.safetensors", LoadOptions(base_dtype=torch.float32), HOST, SYSTEMS)

    def make(**options):
        speech = SpeechToVideo(
            audio=rand(1, 3, 8, 3 * WINDOW), scale=torch.tensor(1.0), reference=rand(1, 16, 1, 8, 8, seed=1)
        )
        speech = replace(speech, **{k: options.pop(k) for k in ("audio", "reference", "pose") if k in options})
        image = ImageEmbeds(
            latent_shape=(16, 9, 8, 8), num_frames=33, payloads=(speech,),
            loop=SpeechLoop(vae=vae, window_frames=WINDOW),
        )  # fmt: skip
        text = TextEmbeds(positive=(rand(4, tiny.TEXT_DIM),), negative=(rand(4, tiny.TEXT_DIM, seed=1),))
        fields = dict(cfg=2.0, seed=7, schedule=make_schedule(ScheduleSpec(name="euler", steps=2, shift=5.0)))
        return SampleRequest(**{"model": model, "text": text, "image": image, **fields, **options})

    return make


@pytest.fixture
def seen(monkeypatch):
    """The conditions and the noise of each window."""
    windows, denoise = [], module.denoise

    def watching(denoiser, schedule, **options):
        payload = next(p for p in denoiser._conditions.payloads if isinstance(p, SpeechToVideo))
        windows.append((payload, options["latents"]))
        return denoise(denoiser, schedule, **options)

    monkeypatch.setattr(module, "denoise", watching)
    return windows


def test_each_window_goes_on_from_the_frames_before(request_of, seen):
    request = request_of(pose=rand(1, 16, 5, 8, 8, seed=2))
    result, _ = sample(request, HOST)
    video, vae = result["video"], request.image.loop.vae
    assert video.shape == (3 * WINDOW - 3, 64, 64, 3) and video.isfinite().all() and video.abs().max() <= 1
    frames = video.movedim(-1, 0)
    before = torch.cat((torch.zeros(3, PAST, 64, 64), frames), dim=1)
    speech = request.image.payloads[0]
    for index, (payload, noise) in enumerate(seen):
        assert torch.equal(payload.audio, speech.audio[..., index * WINDOW : (index + 1) * WINDOW])
        assert (payload.lead, payload.lead_latents) == (PAST, 3)
        generator = torch.Generator().manual_seed(7 + index)
        assert torch.equal(noise, torch.randn(16, 4, 8, 8, generator=generator))
        if index:
            end = PAST + index * WINDOW - 3
            want = vae.encode(before[:, end - PAST : end], quiet=True)
            # The frames of the result have 8 bits; what windows follow on has not been rounded.
            torch.testing.assert_close(payload.past[0], want, rtol=0, atol=2e-2)
    assert seen[0][0].past is None
    poses = [payload.pose for payload, _ in seen]
    assert torch.equal(torch.cat(poses[:2], 2)[:, :, :5], speech.pose)
    black = vae.encode(-torch.ones(3, 17, 64, 64), quiet=True)[None, :, 1:]
    torch.testing.assert_close(poses[2], black, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(poses[1][:, :, 1:], black[:, :, :3], rtol=1e-4, atol=1e-4)


def test_a_schedule_that_begins_below_noise_alone_scales_it(request_of, seen):
    rcm = make_schedule(ScheduleSpec(name="rcm", steps=1, shift=5.0))
    sample(request_of(audio=rand(1, 3, 8, WINDOW), schedule=rcm), HOST)
    ((_, noise),) = seen
    want = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * 120 / 121
    torch.testing.assert_close(noise, want)


def test_frames_are_decoded_behind_what_the_window_follows_on(request_of):
    request = request_of(audio=rand(1, 3, 8, WINDOW))
    result, _ = sample(request, HOST)
    vae, latents = request.image.loop.vae, result["samples"][0]
    behind = torch.cat((request.image.payloads[0].reference[0], latents), dim=1)
    want = vae.decode(behind, quiet=True)[:, 4:].clamp(-1, 1)
    torch.testing.assert_close(result["video"].movedim(-1, 0), want, rtol=0, atol=EIGHT_BITS)
    alone, _ = sample(request_of(audio=rand(1, 3, 8, WINDOW), reference=None), HOST)
    want = vae.decode(alone["samples"][0], quiet=True).clamp(-1, 1)
    torch.testing.assert_close(alone["video"].movedim(-1, 0), want, rtol=0, atol=EIGHT_BITS)


def test_prompts_go_by_the_window_and_the_video_passes_the_decoder(request_of, monkeypatch):
    prompts = tuple(rand(4, tiny.TEXT_DIM, seed=i) for i in (1, 2))
    used, make = [], module.make_denoiser
    monkeypatch.setattr(
        module, "make_denoiser", lambda *a, **k: used.append(k["conditions"].positive) or make(*a, **k)
    )
    request = request_of(text=TextEmbeds(positive=prompts), cfg=1.0)
    result, _ = sample(request, HOST)
    assert [any(a is b for b in prompts[1:]) for a in used] == [False, True, True]
    (images,) = N["WanVideoDecode"]().decode(request.image.loop.vae, result, False, 272, 272, 144, 128)
    assert images.shape == (45, 64, 64, 3) and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(
    ("error", "says"), [(CancelledError, None), (torch.OutOfMemoryError("x"), "Window 2 of 3.*The 13 frames before")]
)
def test_finished_windows_outlive_a_run_that_is_broken_off(error, says, request_of, tmp_path, monkeypatch, caplog):
    whole = sample(request_of(), HOST)[0]["video"]
    denoise = module.denoise

    def breaking(denoiser, schedule, **options):
        if next(p for p in denoiser._conditions.payloads if isinstance(p, SpeechToVideo)).past is not None:
            raise error
        return denoise(denoiser, schedule, **options)

    monkeypatch.setattr(module, "denoise", breaking)
    with pytest.raises(error if isinstance(error, type) else type(error), match=says):
        sample(request_of(), StandaloneHost(device="cpu", outputs=tmp_path))
    (folder,) = tmp_path.glob("*_unfinished")
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    assert np.array_equal(frames, ((whole[: WINDOW - 3] + 1) * 127.5).round().byte().numpy())
    assert says or f"Window 2 of 3 (frames 13-28) was broken off. The 13 frames before are in {folder}." in caplog.text


def test_frames_that_are_no_numbers_are_told_of(request_of, monkeypatch):
    request = request_of()
    decode = request.image.loop.vae.decode
    monkeypatch.setattr(request.image.loop.vae, "decode", lambda latents, **o: decode(latents, **o) * float("nan"))
    with pytest.raises(NotFiniteError, match="Window 1 of 3.*decoded NaN.*no frames before it"):
        sample(request, HOST)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"audio": None}, "needs speech"),
        ({"text": None}, "no prompt"),
        ({"text": TextEmbeds(positive=(torch.ones(4, 64),))}, "no negative prompt"),
        ({"context": ContextOptions()}, "two ways to make a long video"),
        ({"samples": {"samples": rand(1, 16, 4, 8, 8)}}, "takes no samples"),
        ({"schedule": make_schedule(ScheduleSpec(name="multitalk", steps=2, shift=5.0))}, "is not for enable"),
        ({"schedule": make_schedule(ScheduleSpec(name="euler", steps=3, shift=5.0, end_step=2))}, "of the 3 steps"),
        ({"samples": {"samples": rand(1, 16, 4, 8, 8), "video": rand(9, 32, 32, 3)}}, "in windows; of its latents"),
        ({"payloads": (Uni3CArgs(None, rand(1, 16, 2, 4, 4)),)}, "render_latent of Uni3C has 2 frames"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(options, says, request_of, seen):
    with pytest.raises(ValueError, match=says):
        sample(request_of(**options), HOST)
    assert not seen


def test_the_last_window_may_reach_behind_what_a_system_brings(request_of):
    """33 frames are nine latents, of which windows of four would read twelve."""
    module.WindowMaker(request_of(payloads=(Uni3CArgs(None, rand(1, 16, 9, 8, 8)),)), HOST).check()
