"""The sampler on a model whose velocity is known in closed form, and on a tiny transformer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from sampler_stand_in import (
    MEAN,
    SHAPE,
    SPREAD,
    CancelledError,
    FakeHost,
    FakeModel,
    FakeProgress,
    GaussianTransformer,
    config,
    latents_of,
    rand,
    request,
    schedule,
)
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.phantom.extension import Phantom, SubjectReferences
from wanvideo_wrapper.prompt_segments.extension import PromptSegmentsExtension, segments
from wanvideo_wrapper.wanvideo import denoise
from wanvideo_wrapper.wanvideo.conditioning import Payload, Row, Step
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.latents import Inpainting, change_mask
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import RunWatcher, prepare_start, sample
from wanvideo_wrapper.wanvideo.schedulers import available
from wanvideo_wrapper.wanvideo.windows import ContextOptions

SPEECH = MultiTalk(features=6, intermediate_dim=8, context_tokens=2, output_dim=4, voiced=(0,))


@pytest.mark.parametrize("name", [name for name in available() if name != "multitalk"])
def test_every_sampler_runs_and_repeats_exactly(name):
    runs = [latents_of(sample(request(schedule=schedule(name), seed=s), FakeHost())) for s in (42, 42, 43)]
    assert torch.isfinite(runs[0]).all() and runs[0].dtype == torch.float32 and runs[0].shape == SHAPE
    assert torch.equal(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().max() > 0.1


def test_a_schedule_is_that_of_the_models_width():
    model = FakeModel()
    sample(request(model, schedule=schedule("flowmatch_causvid")), FakeHost())
    assert [call.timestep.item() for call in model.transformer.calls] == [1000, 750, 500, 250]


def test_rcm_begins_with_the_share_of_noise_of_its_first_level():
    """Whose angle is that of noise 120 times as strong as the video; clean samples are noised to that level."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    video = torch.randn(1, *SHAPE)
    for samples, want in ((None, noise * 120 / 121), ({"samples": video}, (video[0] + 120 * noise) / 121)):
        model = FakeModel()
        sample(request(model, schedule=schedule("rcm"), samples=samples, add_noise_to_samples=True), FakeHost())
        first = model.transformer.calls[0]
        torch.testing.assert_close(first.latents[0], want, rtol=0, atol=1e-6)
        assert first.timestep.unique().item() == pytest.approx(120_000 / 121)
    model, late = FakeModel(), schedule("rcm", start_step=1)
    sample(request(model, schedule=late), FakeHost())
    want = noise / (1 + 1 / math.tan(1.5))
    torch.testing.assert_close(model.transformer.calls[0].latents[0], want, rtol=0, atol=1e-6)
    model = FakeModel()
    sample(request(model, schedule=schedule("euler", sigmas=torch.tensor([0.9, 0.0]))), FakeHost())
    assert torch.equal(model.transformer.calls[0].latents[0], noise)


@pytest.mark.parametrize("name", ["lcm", "rcm", "vibt_unipc"])
def test_two_samplers_draw_the_noise_of_one(name):
    whole = latents_of(sample(request(schedule=schedule(name)), FakeHost()))
    first, _ = sample(request(schedule=schedule(name, end_step=2)), FakeHost())
    second = request(schedule=schedule(name, start_step=2), samples=first, seed=5)
    assert torch.equal(latents_of(sample(second, FakeHost())), whole)


def test_a_request_can_be_sampled_twice():
    asked = request(schedule=schedule("unipc"))
    assert torch.equal(latents_of(sample(asked, FakeHost())), latents_of(sample(asked, FakeHost())))


def test_result_is_the_exact_flow_of_the_seeds_noise():
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    found, estimate = sample(request(schedule=schedule("dpm++", 300)), FakeHost())
    torch.testing.assert_close(found["samples"][0], MEAN + SPREAD * noise, rtol=0, atol=0.02)
    torch.testing.assert_close(estimate["samples"], found["samples"], rtol=0, atol=0.05)


def test_host_is_told_every_step_and_the_model_released():
    model, host = FakeModel(), FakeHost()
    _, estimate = sample(request(model, schedule=schedule(steps=4)), host)
    assert host.log[:2] == [4, "open"] and [entry[0] for entry in host.log[2:-1]] == [1, 2, 3, 4]
    assert host.log[-1] == "close" and host.asked == 4
    torch.testing.assert_close(host.log[-2][1], estimate["samples"][0])
    assert model.events == ["enter", 0, 1, 2, 3, "leave", "release"]
    model = FakeModel()
    sample(request(model, force_offload=False), FakeHost())
    assert model.events[-1] == "leave"


class Clock:
    """Stands while nothing is asked of the model, whose first answer takes 5 s and others 0.5 s."""

    def __init__(self, model):
        self.model = model

    def perf_counter(self):
        calls = len(self.model.transformer.calls)
        return 4.5 + 0.5 * calls if calls else 0.0


@pytest.mark.parametrize("steps", [1, 4])
def test_the_log_tells_what_the_first_step_cost(steps, monkeypatch, caplog):
    model = FakeModel()
    monkeypatch.setattr(denoise, "time", Clock(model))
    caplog.set_level("INFO", logger="wanvideo")
    sample(request(model, schedule=schedule(steps=steps)), FakeHost())
    told = [record.message for record in caplog.records if "first step took" in record.message]
    assert told == (["The first step took 5.0 s, the others 0.5 s each."] if steps > 1 else [])


def test_only_the_first_window_tells(caplog):
    caplog.set_level("INFO", logger="wanvideo")
    watcher = RunWatcher(FakeHost(), FakeProgress([]), lambda index: None)
    for pace in (denoise.Pace(7.0, 2.0), denoise.Pace(2.0, 2.0)):
        watcher.finish(pace)
    assert watcher.pace == (7.0, 2.0) and [r.message for r in caplog.records] == [
        "The first step took 7.0 s, the others 2.0 s each."
    ]


def test_what_the_model_brings_conditions_the_run():
    events = []

    @dataclass(frozen=True)
    class Brought(EnhanceArgs):
        @contextlib.contextmanager
        def active(self, *, swapped):
            events.append("enter")
            yield
            events.append("leave")

    model = FakeModel(GaussianTransformer(config(), (EnhanceAVideo(),)))
    model.payloads = (Brought(1.0),)
    sample(request(model), FakeHost())
    assert events == ["enter", "leave"]
    assert all([type(p) for p in call.payloads] == [Brought] for call in model.transformer.calls)


@pytest.mark.parametrize("force_offload", [True, False])
def test_cancelling_leaves_nothing_half_done(force_offload):
    model, samples = FakeModel(), {"samples": rand(1, *SHAPE)}
    asked = request(model, samples=samples, schedule=schedule("unipc"), force_offload=force_offload)
    before = samples["samples"].clone()
    host = FakeHost(cancel_at=3)
    with pytest.raises(CancelledError):
        sample(asked, host)
    assert host.log[-1] == "close" and len(model.transformer.calls) == 2
    assert model.events[-1] == ("release" if force_offload else "leave") and "leave" in model.events
    assert torch.equal(samples["samples"], before)
    fresh = latents_of(sample(request(samples=samples, schedule=schedule("unipc")), FakeHost()))
    assert torch.equal(latents_of(sample(asked, FakeHost())), fresh)


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_two_models_continue_one_run(name):
    whole = latents_of(sample(request(schedule=schedule(name)), FakeHost()))
    first, _ = sample(request(schedule=schedule(name, end_step=2)), FakeHost())
    second = request(schedule=schedule(name, start_step=2), samples=first, seed=7)
    assert torch.equal(latents_of(sample(second, FakeHost())), whole)
    steps = [call.step for call in second.model.transformer.calls]
    assert [step.index for step in steps] == [2, 3, 4, 5] and steps[0].total == 6


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_multistep_samplers_continue_closely(name):
    whole = latents_of(sample(request(schedule=schedule(name, 60)), FakeHost()))
    first, _ = sample(request(schedule=schedule(name, 60, end_step=20)), FakeHost())
    second = latents_of(sample(request(schedule=schedule(name, 60, start_step=20), samples=first), FakeHost()))
    torch.testing.assert_close(second, whole, rtol=0, atol=0.03)


def test_samples_start_noised_or_as_they_are():
    clean, noise = rand(1, *SHAPE, seed=5), torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))

    def first_input(**changes):
        asked = request(samples={"samples": clean}, **changes)
        sample(asked, FakeHost())
        return asked.model.transformer.calls[0].latents[0]

    torch.testing.assert_close(first_input(), clean[0])
    half = schedule(denoise_strength=0.5)
    sigma = float(half.sigmas[0])
    assert 0 < sigma < 1
    torch.testing.assert_close(first_input(schedule=half), sigma * noise + (1 - sigma) * clean[0])
    late = schedule(start_step=3)
    sigma = float(late.sigmas[0])
    torch.testing.assert_close(
        first_input(schedule=late, add_noise_to_samples=True), sigma * noise + (1 - sigma) * clean[0]
    )


def test_samples_are_as_noisy_as_the_model_is_told():
    """Timesteps of multistep solvers are rounded down, and so is the noise of latents that are given."""
    clean, noise = rand(1, *SHAPE, seed=5), torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    late = schedule("unipc", 7, start_step=3)
    told = float(late.timesteps[0]) / 1000
    assert told < float(late.sigmas[0]) - 1e-4
    asked = request(samples={"samples": clean}, schedule=late, add_noise_to_samples=True)
    sample(asked, FakeHost())
    first = asked.model.transformer.calls[0].latents[0]
    torch.testing.assert_close(first, told * noise + (1 - told) * clean[0], rtol=0, atol=1e-6)


def test_shorter_samples_repeat_their_first_frame():
    clean = rand(1, 16, 2, 4, 6, seed=5)
    asked = request(samples={"samples": clean})
    sample(asked, FakeHost())
    want = torch.cat([clean[0, :, :1], clean[0]], dim=1)
    torch.testing.assert_close(asked.model.transformer.calls[0].latents[0], want)


@pytest.mark.parametrize("shape", [(1, 16, 4, 4, 6), (1, 16, 3, 4, 4), (1, 48, 3, 4, 6), (2, 16, 3, 4, 6)])
def test_samples_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="same width, height, frame count and VAE"):
        sample(request(samples={"samples": rand(*shape)}), FakeHost())


@pytest.mark.parametrize("name", ["euler", "unipc", "lcm"])
def test_mask_keeps_the_unmasked_latents(name):
    original = rand(1, *SHAPE, seed=5)
    mask = torch.zeros(3, 4, 6)
    mask[1, :, 3:] = 1
    samples = {"samples": original, "noise_mask": mask}
    found, _ = sample(request(samples=samples, add_noise_to_samples=True, schedule=schedule(name, 20)), FakeHost())
    painted = mask.bool().expand(SHAPE)
    torch.testing.assert_close(found["samples"][0][~painted], original[0][~painted])
    assert (found["samples"][0][painted] - original[0][painted]).abs().mean() > 0.3
    torch.testing.assert_close(found["original_image"], original[0])


def test_mask_values_are_times():
    """A value of 0.5 keeps the original for half of the steps, at the noise level reached."""
    plan = schedule(steps=10)
    original, noise, latents = rand(*SHAPE, seed=1), rand(*SHAPE, seed=2), rand(*SHAPE, seed=3)
    hook = Inpainting(original, noise, torch.full((1, *SHAPE[1:]), 0.5), plan)
    for index in range(10):
        sigma = float(plan.sigmas[index + 1])
        want = (1 - sigma) * original + sigma * noise if index < 5 else latents
        torch.testing.assert_close(hook.after(latents, index), want)


def test_masks_are_brought_to_latent_size():
    mask = change_mask(torch.ones(1, 1, 32, 48), SHAPE)
    assert mask.shape == (1, 3, 4, 6) and bool((mask == 1).all())
    frames = change_mask(torch.stack([torch.zeros(8, 8), torch.zeros(8, 8), torch.ones(8, 8)]), SHAPE)
    assert frames[0].mean(dim=(1, 2)).tolist() == [0.0, 0.0, 1.0]


def test_given_frames_of_the_5b_stay_at_timestep_zero():
    transformer = GaussianTransformer(config(in_dim=48, out_dim=48))
    first = rand(1, 48, 1, 4, 6, seed=5)
    image = ImageEmbeds(latent_shape=(48, 3, 4, 6), num_frames=9, given_latents=((0, first),))
    found, estimate = sample(request(FakeModel(transformer), image=image, schedule=schedule("unipc")), FakeHost())
    for result in (found, estimate):
        torch.testing.assert_close(result["samples"][0][:, :1], first[0])
    for call, timestep in zip(transformer.calls, schedule("unipc").timesteps, strict=True):
        torch.testing.assert_close(call.latents[0][:, :1], first[0])
        torch.testing.assert_close(call.timestep, torch.tensor([[0.0, timestep, timestep]]))
    free = request(FakeModel(GaussianTransformer(config(in_dim=48, out_dim=48))), schedule=schedule("unipc"))
    alone = sample(replace(free, image=replace(image, given_latents=())), FakeHost())
    torch.testing.assert_close(found["samples"][0][:, 1:], latents_of(alone)[:, 1:])


def test_noise_of_a_step_is_drawn_for_frames_that_move_alone():
    """The order of a seed's numbers is that of saved graphs."""
    transformer = GaussianTransformer(config(in_dim=48, out_dim=48))
    image = ImageEmbeds(latent_shape=(48, 3, 4, 6), num_frames=9, given_latents=((0, rand(1, 48, 1, 4, 6, seed=5)),))
    plan = schedule("lcm", 2)
    sample(request(FakeModel(transformer), image=image, schedule=plan), FakeHost())
    first, second = transformer.calls
    seeded = torch.Generator().manual_seed(42)
    torch.randn(48, 3, 4, 6, generator=seeded)
    drawn = torch.randn(48, 2, 4, 6, generator=seeded)
    clean = first.latents[0] - plan.sigmas[0] * transformer(first)[0]
    want = (1 - plan.sigmas[1]) * clean[:, 1:] + plan.sigmas[1] * drawn
    torch.testing.assert_close(second.latents[0][:, 1:], want)


def test_empty_embeds_fit_the_5b():
    transformer = GaussianTransformer(config(in_dim=48, out_dim=48))
    image = ImageEmbeds(latent_shape=(16, 3, 8, 12), num_frames=9)
    assert latents_of(sample(request(FakeModel(transformer), image=image), FakeHost())).shape == (48, 3, 4, 6)


def test_given_frames_of_other_models_only_start_the_noise_unless_the_scheduler_times_frames():
    last = rand(1, 16, 1, 4, 6, seed=5)
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, given_latents=((-1, last),))
    asked = request(image=image)
    found = latents_of(sample(asked, FakeHost()))
    calls = asked.model.transformer.calls
    torch.testing.assert_close(calls[0].latents[0][:, -1:], last[0])
    assert calls[0].timestep.shape == (1,) and (found[:, -1:] - last[0]).abs().max() > 0.1
    asked = request(image=image, schedule=schedule("flowmatch_pusa"))
    torch.testing.assert_close(latents_of(sample(asked, FakeHost()))[:, -1:], last[0])
    for call, timestep in zip(asked.model.transformer.calls, asked.schedule.timesteps, strict=True):
        torch.testing.assert_close(call.timestep, torch.tensor([[timestep, timestep, 0.0]]))
    with pytest.raises(ValueError, match="extra latents"):
        sample(request(image=replace(image, given_latents=((0, rand(16, 1, 8, 6)),))), FakeHost())


def test_flags_pass_on_to_the_decoder():
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, extra_end_frame=True, leading_latents=1)
    for result in sample(request(image=image), FakeHost()):
        assert result["extra_end_frame"] is True and result["has_ref"] == 1
        assert result["samples"].shape == (1, *SHAPE)


@pytest.mark.parametrize("bad_at", [0, 5])
def test_nan_is_one_clear_error(bad_at):
    transformer = GaussianTransformer(config())
    transformer.bad_at = bad_at
    model = FakeModel(transformer)
    said = f"model's output was NaN or infinite at step {bad_at + 1} of 6.*base_precision"
    with pytest.raises(ValueError, match=said):
        sample(request(model), FakeHost())
    looks = 2 if bad_at == 0 else 1
    assert len(transformer.calls) == bad_at + looks and model.events[-1] == "release"


@dataclass(frozen=True)
class FillsChannels(Payload):
    needs: ClassVar[str] = "none"
    fills_channels: ClassVar[bool] = True


@dataclass(frozen=True)
class Filler(Extension):
    payload: ClassVar[type] = FillsChannels


def test_a_system_that_fills_the_condition_channels_stands_for_the_picture():
    def run(out_dim, shape=SHAPE):
        model = GaussianTransformer(config(in_dim=out_dim + 20, out_dim=out_dim), (Filler(),))
        image = ImageEmbeds(latent_shape=shape, num_frames=9, payloads=(FillsChannels(),))
        return latents_of(sample(request(FakeModel(model), image=image), FakeHost()))

    assert run(16).shape == SHAPE
    assert run(48, (16, 3, 8, 12)).shape == (48, 3, 4, 6), "it holds no latents of another VAE"


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="connect text_embeds"):
        sample(request(text=None), FakeHost())
    with pytest.raises(ValueError, match="only for videos that are made in a loop"):
        sample(request(schedule=schedule("multitalk")), FakeHost())
    picture = ImageCondition(rand(1, *SHAPE), rand(1, 4, *SHAPE[1:]))
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, payloads=(picture,))
    with pytest.raises(ValueError, match="text-to-video model, but encoded images"):
        sample(request(image=image), FakeHost())
    i2v = FakeModel(GaussianTransformer(config(in_dim=36), (Phantom(),)))
    subjects = SubjectReferences(rand(1, 16, 2, *SHAPE[2:]))
    references = ImageEmbeds(latent_shape=SHAPE, num_frames=9, payloads=(subjects,))
    for given in ({}, {"image": references}):
        with pytest.raises(ValueError, match="20 channels of encoded images.*none are connected"):
            sample(request(i2v, **given), FakeHost())
    with pytest.raises(ValueError, match="48 latent channels but the model predicts 16"):
        sample(request(image=ImageEmbeds(latent_shape=(48, 3, 4, 6), num_frames=9)), FakeHost())


def test_payloads_reach_the_model(caplog):
    clip = ClipImage(positive=rand(1, 6, 4, seed=1), negative=rand(1, 6, 4, seed=2))
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, payloads=(clip,))
    speech = MultiTalkEmbeds(features=(rand(20, 2, 3),), scale=0.7, cfg_scale=[4.0, 1.0])
    transformer = GaussianTransformer(config(), (ClipImageExtension(clip_dim=4), SPEECH, EnhanceAVideo()))
    enhance = EnhanceArgs(2.0)
    asked = request(FakeModel(transformer), image=image, payloads=(speech, enhance), cfg=[5.0, 1.0], riflex_index=3)
    sample(asked, FakeHost())
    kinds = [[type(payload) for payload in call.payloads] for call in transformer.calls]
    assert kinds == [[ClipImage, AudioWindow, EnhanceArgs]] * (3 + 5)
    assert all(call.riflex_index == 3 for call in transformer.calls)
    audio = transformer.calls[0].payloads[1]
    assert audio.audio.shape == (1, 1, 9, 5, 2, 3) and float(audio.scale) == pytest.approx(0.7)
    assert bool((transformer.calls[2].payloads[1].audio == 0).all())

    bare = request(image=image)
    sample(bare, FakeHost())
    assert all(not call.payloads for call in bare.model.transformer.calls)
    assert "no image cross-attention" in caplog.text


@dataclass(frozen=True)
class Sized(Payload):
    dim: int = 0
    needs: ClassVar[str] = "none"

    def fitted(self, config):
        return Sized(config.dim)

    def guidance(self, scale, step):
        return (Row(float(self.dim)),)


class SizedExtension(Extension):
    payload = Sized


def test_payloads_take_the_form_for_the_model():
    """Both what guides and what the model reads, from all places that payloads come from."""
    for place in (
        {"payloads": (Sized(),)},
        {"image": ImageEmbeds(latent_shape=SHAPE, num_frames=9, payloads=(Sized(),))},
        {"text": TextEmbeds(positive=(rand(5, 8),), payloads=(Sized(),))},
    ):
        model = FakeModel(GaussianTransformer(config(), (SizedExtension(),)))
        asked = request(model, **place)
        sample(asked, FakeHost())
        assert asked.guidance.rows(Step()) == (Row(48.0),)
        assert all(call.payloads == (Sized(48),) for call in model.transformer.calls) and model.transformer.calls


def test_several_prompts_share_the_frames_of_positive_passes():
    prompts = (rand(5, 8, seed=1), rand(4, 8, seed=3))
    text = TextEmbeds(positive=prompts, negative=(rand(3, 8, seed=2),), payloads=segments(prompts))
    transformer = GaussianTransformer(config(), (PromptSegmentsExtension(),))
    asked = request(FakeModel(transformer), text=text, cfg=5.0, batched_cfg=True, schedule=schedule(steps=1))
    sample(asked, FakeHost())
    positive, negative = asked.model.transformer.calls
    torch.testing.assert_close(positive.text[0], text.positive[0])
    torch.testing.assert_close(positive.payloads[0].prompts[0], text.positive[1])
    torch.testing.assert_close(negative.text[0], text.negative[0])
    assert negative.payloads == ()


def test_a_model_computes_where_it_was_loaded():
    """Not on the device that the host names by then."""
    asked = request(cfg=3.0)
    assert torch.equal(latents_of(sample(asked, FakeHost(device="meta"))), latents_of(sample(asked, FakeHost())))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in available() if name != "multitalk"])
def test_every_sampler_gives_the_same_on_the_gpu(name):
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, given_latents=((0, rand(16, 1, 4, 6, seed=5)),))
    mask = torch.zeros(3, 4, 6)
    mask[..., 3:] = 1
    samples = {"samples": rand(1, *SHAPE, seed=5), "noise_mask": mask}
    asked = request(image=image, samples=samples, add_noise_to_samples=True, schedule=schedule(name), cfg=3.0)
    asked.model.device = torch.device("cuda")
    found = latents_of(sample(asked, FakeHost()))
    assert found.device.type == "cpu"
    asked.model.device = torch.device("cpu")
    torch.testing.assert_close(found, latents_of(sample(asked, FakeHost())), rtol=1e-4, atol=1e-4)


def test_tiny_transformer_end_to_end():
    model = WanModel(config(in_dim=36), (ImageToVideo(), ClipImageExtension(clip_dim=4))).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    picture = ImageCondition(rand(1, *SHAPE, seed=1), torch.ones(1, 4, *SHAPE[1:]))
    image = ImageEmbeds(
        latent_shape=SHAPE,
        num_frames=9,
        payloads=(picture, ClipImage(positive=rand(1, 6, 4, seed=2))),
    )
    asked = request(FakeModel(model), image=image, cfg=4.0, schedule=schedule("unipc"))
    results = [latents_of(sample(replace(asked, batched_cfg=b), FakeHost())) for b in (False, True)]
    assert torch.isfinite(results[0]).all() and math.isfinite(float(results[0].std())) and results[0].std() > 0.1
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
    other = replace(picture, cond=rand(1, *SHAPE, seed=9))
    other = replace(asked, image=replace(image, payloads=(other, *image.payloads[1:])))
    changed = latents_of(sample(other, FakeHost()))
    assert (changed - results[0]).abs().max() > 1e-3


def test_start_draws_the_noise_before_it_restores_the_generator():
    state = torch.Generator().manual_seed(99).get_state()
    plan = schedule(start_step=2)
    generator = torch.Generator().manual_seed(42)
    samples = {"samples": rand(1, *SHAPE), "generator_state": state}
    start = prepare_start(request(samples=samples, schedule=plan), plan, generator)
    torch.testing.assert_close(start.latents, samples["samples"][0])
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(("context", "looped"), [
    (None, False),
    (ContextOptions(schedule="uniform_looped", size=5, stride=4, overlap=4), True),
    (ContextOptions(schedule="uniform_looped", size=9, stride=4, overlap=4), False),
    (ContextOptions(schedule="uniform_standard", size=5, stride=4, overlap=4), False),
])  # fmt: skip
def test_samples_say_whether_their_end_leads_to_their_start(context, looped):
    for result in sample(request(context=context), FakeHost()):
        assert result["looped"] is looped
