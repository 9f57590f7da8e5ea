"""The runs of FreeInit against one loop with one generator, and in the sampler node."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import Runs, prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.freeinit.frequencies import low_pass, mixed
from wanvideo_wrapper.freeinit.iterations import FreeInit
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import prepare_start
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

SHAPE = (16, 3, 4, 6)


def request(**changes):
    spec = {name: changes.pop(name) for name in ("start_step", "denoise_strength") if name in changes}
    fields = {
        "model": SimpleNamespace(config=WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1)),
        "text": TextEmbeds(positive=(prompt(1),)),
        "image": ImageEmbeds(latent_shape=SHAPE, num_frames=9),
        "schedule": make_schedule(ScheduleSpec(name="euler", steps=4, shift=3.0, **spec)),
        "cfg": 1.0, "seed": 42,
    }  # fmt: skip
    return SampleRequest(**{**fields, **changes})


def solve(latents, generator):
    """Stands for a schedule whose solver draws noise."""
    return 0.3 * latents + 0.1 * torch.randn(latents.shape, generator=generator)


class FromElsewhere(Modifier):
    replaces_start = True


class Sampler:
    """As `sample_once`, with `solve` in the place of model and solver."""

    def __init__(self):
        self.asked = []

    def __call__(self, request, host):
        self.asked.append(request)
        generator = torch.Generator().manual_seed(request.seed)
        video = solve(prepare_start(request, request.schedule.fresh(), generator).latents, generator)
        latent = {"samples": video[None], "generator_state": generator.get_state()}
        return latent, {"samples": video[None] + 1}


def by_hand(settings, video=None):
    """One generator for everything, as published; a video stands for the first run."""
    generator = torch.Generator().manual_seed(42)
    noise = torch.randn(SHAPE, generator=generator)
    first = noise if video is None else video
    if video is None:
        video = solve(noise, generator)
    mask = low_pass(
        SHAPE[1:], settings.method, order=settings.order, spatial=settings.spatial, temporal=settings.temporal
    )
    for _ in range(settings.iterations - 1):
        noised = 0.001 * video.double() + 0.999 * first.double()
        fresh = torch.randn(SHAPE, generator=generator)
        video = solve(mixed(noised, fresh.double(), mask.double()).float(), generator)
    return video


@pytest.mark.parametrize("settings", [
    FreeInit(), FreeInit(iterations=1), FreeInit(iterations=4, method="butterworth", order=2, spatial=0.5),
    FreeInit(iterations=2, method="gaussian", temporal=0.25),
])  # fmt: skip
def test_runs_go_on_from_each_other(settings):
    run = Sampler()
    result, clean = settings.around_run(run)(request(), None)
    torch.testing.assert_close(result["samples"][0], by_hand(settings), rtol=1e-5, atol=1e-5)
    assert torch.equal(clean["samples"], result["samples"] + 1)
    assert len(run.asked) == settings.iterations


def test_the_model_stays_on_the_device_between_runs():
    for offload in (True, False):
        run = Sampler()
        FreeInit().around_run(run)(request(force_offload=offload), None)
        assert [asked.force_offload for asked in run.asked] == [False, False, offload]


@pytest.mark.parametrize(("extra_end", "places"), [(False, [0, 1, 2]), (True, [0, 1, 1])])
def test_samples_stand_for_the_first_run(extra_end, places):
    run, settings = Sampler(), FreeInit(iterations=3)
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, extra_end_frame=extra_end)
    video = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))[:, : 2 if extra_end else 3]
    asked = request(image=image, samples={"samples": video[None]})
    result, _ = settings.around_run(run)(asked, None)
    torch.testing.assert_close(result["samples"][0], by_hand(settings, video[:, places]), rtol=1e-5, atol=1e-5)
    assert len(run.asked) == 2
    run = Sampler()
    FreeInit(iterations=1).around_run(run)(asked, None)
    assert run.asked == [replace(asked)]


def test_a_mask_keeps_the_same_original_in_every_run():
    run = Sampler()
    video = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    samples = {"samples": video[None], "noise_mask": torch.ones(3, 4, 6)}
    FreeInit().around_run(run)(request(samples=samples, add_noise_to_samples=True), None)
    assert len(run.asked) == 2
    for asked in run.asked:
        assert torch.equal(asked.samples["original_image"], video) and "noise_mask" in asked.samples
        assert not asked.noises_samples


def test_what_does_not_begin_with_noise_is_refused_before_any_run():
    loop = ImageEmbeds(latent_shape=SHAPE, num_frames=9, loop=object())
    for asked, said in (
        (request(start_step=2), "begins every run from noise"),
        (request(denoise_strength=0.5), "begins every run from noise"),
        (request(modifiers=(FromElsewhere(),)), "begins the run in a way of its own"),
        (request(image=loop), "a loop of windows: disconnect freeinit_args"),
    ):
        run = Sampler()
        with pytest.raises(ValueError, match=said):
            FreeInit().around_run(run)(asked, None)
        assert run.asked == []


def test_the_node():
    node = N["WanVideoFreeInitArgs"]()
    want = FreeInit(iterations=2, method="butterworth", order=3, spatial=0.5, temporal=0.25)
    assert node.process(2, "butterworth", 3, 0.5, 0.25) == (want,)
    assert node.process(2, "none", 3, 0.5, 0.25) == (None,)


@pytest.mark.parametrize("scheduler", ["euler", "dpm++_sde"])
def test_runs_of_the_sampler(tmp_path, scheduler):
    """Of the sampler node: the second run alone, from the first one's noise mixed by hand, gives the same."""
    settings = FreeInit(iterations=2, method="gaussian", spatial=0.5)
    with Runs(tmp_path) as runs:
        plain = runs.sample(scheduler=scheduler)
        both = runs.sample(scheduler=scheduler, freeinit_args=settings)
        assert both.isfinite().all() and (plain - both).abs().max() > 1e-2
        assert torch.equal(runs.sample(scheduler=scheduler, freeinit_args=FreeInit(iterations=1)), plain)
        if scheduler == "euler":
            generator = torch.Generator().manual_seed(1)
            noise, fresh = (torch.randn(plain.shape, generator=generator) for _ in range(2))
            mask = low_pass(plain.shape[1:], "gaussian", order=4, spatial=0.5, temporal=1.0)
            start = mixed(0.001 * plain + 0.999 * noise, fresh, mask)
            again = runs.sample(samples={"samples": start[None]})
            torch.testing.assert_close(both, again, rtol=1e-4, atol=1e-4)
