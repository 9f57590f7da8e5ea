"""Sound behind latent frames, windows against the same slice, and guidance against the formulas it is made of."""

import pytest
import torch
from wanvideo_wrapper.humo.conditions import HuMoConditions, audio_windows, with_pictures
from wanvideo_wrapper.humo.extension import HuMo, HuMoWindow
from wanvideo_wrapper.image_to_video.extension import ImageToVideo
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance, per_step
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.shard import ALONE

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_dim=36, text_dim=8, text_len=4)
SMALL = WanConfig(**{**CONFIG.__dict__, "in_dim": 16})
SIZES = HuMo(features=8 * 5 * 3, hidden_dim=10, context_tokens=4, output_dim=12)
FRAMES = 6


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(references=1, **more):
    fields = {
        "features": rand(17, 5, 3), "references": references, "scale": 0.7,
        "cond": rand(1, 20, FRAMES, 4, 4, seed=1), "empty": rand(1, 20, FRAMES, 4, 4, seed=2),
    }  # fmt: skip
    return HuMoConditions(**{**fields, **more})


def behind(features, latent):
    """The sound of one latent frame, one feature frame at a time."""
    first, last = (-2, 2) if latent == 0 else (4 * latent - 5, 4 * latent + 2)
    frames = [features[i] if 0 <= i < len(features) else torch.zeros(5, 3) for i in range(first, last + 1)]
    return torch.stack([torch.zeros(5, 3)] * (8 - len(frames)) + frames)


@pytest.mark.parametrize("length", [1, 4, 17, 40])
def test_sound_behind_latent_frames(length):
    features = rand(length, 5, 3)
    want = torch.stack([behind(features, latent) for latent in range(7)])
    assert torch.equal(audio_windows(features, torch.arange(7)), want)


def test_references_hear_nothing_and_pictures_take_the_last_frames():
    grey, pictures = rand(16, 5, 2, 2), [rand(16, 1, 2, 2, seed=s) for s in (1, 2)]
    cond, empty = with_pictures(grey, pictures)
    assert torch.equal(cond[0, 4:, :3], grey[:, :3]) and torch.equal(empty[0, 4:], grey)
    assert torch.equal(cond[0, 4:, 3:], torch.cat(pictures, dim=1))
    for one in (cond, empty):
        assert bool((one[0, :4, 3:] == 1).all()) and bool((one[0, :4, :3] == 0).all())
    bare, also = with_pictures(grey, ())
    assert torch.equal(bare, also) and torch.equal(bare[0, 4:], grey) and bool((bare[:, :4] == 0).all())

    part = conditions(2).window(whole_window(FRAMES, trailing=2))
    assert bool((part.audio[0, -2:] == 0).all()) and bool((part.audio[0, :-2].flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("frames", [(0, 1, 2), (1, 2, 3), (3, 0, 1), (1, 3)])
def test_a_window_is_the_slice_of_the_whole(frames, leading, references):
    given = conditions(references)
    video = FRAMES - references
    places = (*range(leading), *(leading + f for f in frames), *range(leading + video, leading + FRAMES))
    part = given.window(Window(places, (), leading=leading, trailing=references))
    seen = [*[0] * leading, *frames, *range(video, FRAMES)]
    sound = [behind(given.features, f) if f < video else torch.zeros(8, 5, 3) for f in seen]
    assert torch.equal(part.audio[0], torch.stack(sound))
    for name in ("cond", "early"):
        assert torch.equal(getattr(part, name), given.cond[:, :, seen])
    assert torch.equal(part.empty, given.empty[:, :, seen])
    assert part.references == references and float(part.scale) == pytest.approx(0.7)


def test_a_model_without_channels_goes_without_pictures_by_zeros():
    given = conditions()
    assert given.fitted(CONFIG) is given
    small = given.fitted(SMALL)
    assert small.in_latents and bool((small.empty == 0).all()) and torch.equal(small.cond, given.cond)
    assert given.fitted(SMALL).fitted(SMALL).in_latents


class LinearModel:
    """A known linear answer to latents, text, sound and the pictures that the extension would read."""

    ranks = ALONE

    def __init__(self, config):
        self.config, self.calls = config, 0

    def __call__(self, inputs, memory=None):
        (payload,) = inputs.payloads
        self.calls += 1
        out = []
        for i, latents in enumerate(inputs.latents):
            row = i if payload.audio.shape[0] > 1 else 0
            early = float(inputs.timestep[i]) > 980
            picture = (payload.early if early else payload.cond)[row]
            out.append(answer(latents, inputs.text[i], payload.audio[row], picture, payload.scale))
        return torch.stack(out)


def answer(latents, text, audio, picture, scale):
    return latents[:16] + 2 * text.sum() + scale * audio.sum() + 5 * picture.mean()


def guided(config, text, given, timestep, step, batched=False):
    given = given.fitted(config)
    model, latents = LinearModel(config), rand(16, FRAMES, 4, 4, seed=5)
    denoiser = Denoiser(
        model,
        Conditions(positive=rand(5, 8, seed=6), negative=rand(3, 8, seed=7),
                   payloads=(given.window(whole_window(FRAMES, trailing=given.references)),)),
        guidance=Guidance(cfg=per_step(text), payloads=(given,), batched=batched),
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    velocity = denoiser(latents, torch.tensor(timestep), step)

    def of(prompt, sound, image):
        words = rand(5, 8, seed=6) if prompt else rand(3, 8, seed=7)
        window = given.window(whole_window(FRAMES, trailing=given.references))
        audio = window.audio[0] if sound else torch.zeros_like(window.audio[0])
        pictures = (given.cond if image else given.empty)[0]
        return answer(latents, words, audio, pictures, 0.7)

    return velocity, of, model.calls


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("timestep", [999.0, 981.0, 980.0, 300.0])
@pytest.mark.parametrize(("text", "audio"), [(5.0, 5.5), (2.0, 3.0), (3.0, 4.0), (0.5, 2.0)])
def test_guidance_of_text_image_and_audio(text, audio, timestep, batched):
    velocity, p, calls = guided(CONFIG, text, conditions(cfg_scale=audio), timestep, Step(), batched)
    silent, nothing = p(True, False, True), p(False, False, timestep <= 980)
    want = silent + audio * (p(True, True, True) - nothing) + (text - 2) * (nothing - silent)
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-3)
    assert calls == (1 if batched else 2 if text == 3 else 3)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("timestep", [999.0, 300.0])
@pytest.mark.parametrize(("text", "audio"), [(7.5, 4.0), (2.0, 3.0)])
def test_guidance_of_text_and_audio(text, audio, timestep, batched):
    """With pictures in the latents: the pass with prompt alone cancels."""
    velocity, p, calls = guided(SMALL, text, conditions(cfg_scale=audio), timestep, Step(), batched)
    heard, silent, nothing = p(True, True, False), p(True, False, False), p(False, False, False)
    want = audio * (p(True, True, True) - heard) + text * (heard - silent) + text * (silent - nothing) + nothing
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-3)
    assert calls == (1 if batched else 3)


@pytest.mark.parametrize("timestep", [999.0, 300.0])
@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["17B", "1.7B"])
def test_other_guidance(config, timestep):
    keeps = config is CONFIG
    velocity, p, _ = guided(config, 4.0, conditions(cfg_scale=1.0), timestep, Step())
    base = p(True, False, keeps)
    torch.testing.assert_close(velocity, base + 4 * (p(True, True, True) - base), rtol=1e-4, atol=1e-3)
    velocity, p, calls = guided(config, 1.0, conditions(cfg_scale=6.0), timestep, Step())
    torch.testing.assert_close(velocity, p(True, True, True))
    assert calls == 1


@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["17B", "1.7B"])
@pytest.mark.parametrize(("index", "inside"), [(1, False), (2, True), (4, True), (5, False)])
def test_outside_its_steps_the_prompt_guides_and_sound_stays(config, index, inside):
    given = conditions(cfg_scale=3.0, start=0.2, end=0.4)
    velocity, p, _ = guided(config, 4.0, given, 999.0, Step(index=index, total=10, in_run=index))
    base = p(False, True, config is CONFIG)
    plain = base + 4 * (p(True, True, True) - base)
    assert torch.allclose(velocity, plain, rtol=1e-4, atol=1e-3) != inside


def test_a_list_of_scales_goes_by_the_step_of_the_run():
    given = conditions(cfg_scale=[2.0, 7.0])
    for in_run, audio in ((0, 2.0), (1, 7.0), (5, 7.0)):
        assert given.guidance(4.0, Step(index=in_run + 3, total=10, in_run=in_run))[0].weight == audio


def test_parts_are_what_the_model_reads():
    part = conditions().window(whole_window(FRAMES, trailing=1))
    assert isinstance(part, HuMoWindow) and HuMoConditions.part is HuMoWindow
    assert all(isinstance(one, Payload) and one.encoded and one.needs == part.needs for one in (part, conditions()))
    assert SIZES.payload is HuMoWindow and ImageToVideo.payload is not HuMoWindow
