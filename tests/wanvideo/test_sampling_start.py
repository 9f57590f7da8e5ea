"""What a run of the sampler starts from, and what its model and its log are told before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from sampler_stand_in import SHAPE, FakeHost, FakeModel, GaussianTransformer, config, rand, request, schedule
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.latents import GivenLatents, Inpainting
from wanvideo_wrapper.wanvideo.request import NO_PROMPT, ImageEmbeds, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import RunWatcher, prepare_start, sample, sample_once, whole_window
from wanvideo_wrapper.wanvideo.windows import ContextOptions, free_noise

# Three leading references, two trailing ones, ten frames of video: windows of four.
LONG = ImageEmbeds(latent_shape=(16, 15, 4, 6), num_frames=37, leading_latents=3, trailing_latents=2)
WINDOWS = ContextOptions(schedule="static_standard", size=13, overlap=4)


def seeded(seed=42):
    return torch.Generator().manual_seed(seed)


def started(asked, plan=None):
    return prepare_start(asked, plan or asked.schedule, seeded(asked.seed))


def test_a_model_that_runs_elsewhere_is_given_the_request_as_it_is():
    model, host = FakeModel(), FakeHost()
    model.elsewhere = SimpleNamespace(run=lambda *given: given)
    asked = request(model)
    assert sample(asked, host) == (asked, host)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("context", "frames"), [(None, 15), (WINDOWS, 9), (replace(WINDOWS, size=45), 15)])
def test_the_model_is_prepared_for_what_a_forward_sees(context, frames, batched):
    asked = request(image=LONG, context=context, cfg=3.0, batched_cfg=batched)
    sample(asked, FakeHost())
    assert asked.model.tried == asked.model.planned == (frames, 4, 6, 1 + batched)
    assert {call.latents.shape[2] for call in asked.model.transformer.calls} == {frames}


def test_the_log_tells_what_is_sampled_and_that_windows_are_not_needed(caplog):
    caplog.set_level("INFO", logger="wanvideo")
    unneeded = "The video is not longer than context_frames, so context_options have no effect."
    said = {}
    for context in (None, WINDOWS, replace(WINDOWS, size=37)):
        caplog.clear()
        sample(request(image=LONG, context=context), FakeHost())
        assert "Sampling 15 latent frames of 6x4 in 6 steps." in caplog.messages
        said[context] = unneeded in caplog.messages
    assert list(said.values()) == [False, False, True]


def test_progress_counts_on_under_the_note_of_its_window():
    told = []
    progress = SimpleNamespace(update=lambda done, **more: told.append((done, more)))
    watcher = RunWatcher(FakeHost(), progress, lambda index: None, done=4, note="window 2")
    clean = rand(*SHAPE)
    watcher.end(0, clean)
    assert told == [(5, {"note": "window 2", "preview": clean})] and watcher.done == 5


def test_embeds_without_a_prompt_are_no_prompt():
    with pytest.raises(ValueError, match=NO_PROMPT[:20]):
        sample(request(text=TextEmbeds(positive=(), negative=(rand(3, 8),))), FakeHost())


def test_only_windows_share_the_noise_of_the_first():
    drawn = torch.randn(LONG.latent_shape, generator=(generator := seeded()))
    mixed = drawn.clone()
    mixed[:, 3:13] = free_noise(drawn[:, 3:13], WINDOWS, generator)
    assert not torch.equal(mixed, drawn)
    for context, want in (
        (None, drawn),
        (WINDOWS, mixed),
        (replace(WINDOWS, freenoise=False), drawn),
        (replace(WINDOWS, size=37), drawn),
    ):
        start = started(request(image=LONG, context=context))
        assert torch.equal(start.latents, want) and torch.equal(start.noise, want)


@pytest.mark.parametrize("context", [None, WINDOWS])
def test_connected_noise_is_taken_as_it_is(context):
    noise = rand(*LONG.latent_shape, seed=8)
    start = started(request(image=LONG, context=context, noise=noise))
    assert torch.equal(start.latents, noise) and torch.equal(start.noise, noise)


def test_an_inpainting_keeps_the_original_image_where_there_is_one():
    given, original, mask = rand(1, *SHAPE, seed=3), rand(*SHAPE, seed=4), torch.rand(1, 4, 6)
    assert started(request(samples={"samples": given})).hooks == ()
    for more, want in (({}, given[0]), ({"original_image": original}, original)):
        start = started(request(samples={"samples": given, "noise_mask": mask, **more}))
        (hook,) = start.hooks
        assert isinstance(hook, Inpainting) and torch.equal(hook.original, want) and torch.equal(start.original, want)


END_IMAGE = ImageEmbeds(latent_shape=(16, 4, 4, 6), num_frames=9, extra_end_frame=True)


@pytest.mark.parametrize(
    ("image", "given", "first", "last"),
    [(LONG, 15, 0, 0), (LONG, 10, 3, 2), (LONG, 8, 5, 2), (LONG, 12, 3, 0), (END_IMAGE, 3, 0, 1), (END_IMAGE, 2, 1, 1)],
)
def test_samples_of_the_video_alone_keep_their_place_between_references_and_end_image(image, given, first, last):
    video = rand(1, 16, given, 4, 6, seed=3)
    want = [0] * first + list(range(given)) + [given - 1] * last
    assert torch.equal(started(request(image=image, samples={"samples": video})).latents, video[0, :, want])


def test_a_mask_is_of_the_video_and_leaves_references_and_end_image_free():
    change, mask = torch.rand(10, 4, 6), torch.zeros(1, 4, 6)
    for image, masks, want in (
        (LONG, change, torch.cat((torch.ones(3, 4, 6), change, torch.ones(2, 4, 6)))),
        (END_IMAGE, mask, torch.cat((mask, mask, mask, torch.ones(1, 4, 6)))),
    ):
        samples = {"samples": rand(1, *image.latent_shape, seed=3), "noise_mask": masks}
        (hook,) = started(request(image=image, samples=samples)).hooks
        torch.testing.assert_close(hook.change, want[None])


@dataclass(frozen=True)
class Holds(Payload):
    needs: ClassVar[str] = "none"
    holds_given: ClassVar[bool] = True


def given_start(payloads=(), out_dim=16, **options):
    plan = schedule(options.pop("name", "euler"), **options)
    shape = (out_dim, *SHAPE[1:])
    image = ImageEmbeds(latent_shape=shape, num_frames=9, given_latents=((0, rand(out_dim, 1, 4, 6, seed=5)),))
    model = FakeModel(GaussianTransformer(config(in_dim=out_dim, out_dim=out_dim)))
    return started(request(model, image=image, payloads=payloads, schedule=plan)), image.given_latents[0][1]


def test_given_latents_are_in_the_first_step_of_a_schedule_only():
    (first, given), (later, _) = given_start(), given_start(start_step=1)
    noise = torch.randn(SHAPE, generator=seeded())
    assert torch.equal(first.latents, torch.cat((given, noise[:, 1:]), 1)) and torch.equal(later.latents, noise)


def test_given_latents_are_held_by_models_schedulers_and_payloads_that_do():
    for more, held, times in (
        ({}, False, {}),
        ({"payloads": (Holds(),)}, True, {}),
        ({"out_dim": 48}, True, {0: 0.0}),
        ({"name": "flowmatch_pusa"}, True, {0: 0.0}),
    ):
        start, _ = given_start(**more)
        assert [type(hook) for hook in start.hooks] == [GivenLatents] * held and start.frame_times == times


def test_the_whole_video_as_a_window():
    window = whole_window(7, 1, 2)
    assert window.latents == tuple(range(7)) and window.pixels == tuple(range(13))
    assert (window.leading, window.trailing, window.whole, window.total) == (1, 2, True, 7)
    assert whole_window(3) == whole_window(3, 0, 0) and whole_window(3).pixels == tuple(range(9))


@dataclass(frozen=True)
class Part(Payload):
    """Its part in a video without windows is `other`."""

    needs: ClassVar[str] = "none"
    other: Payload | None = None

    def window(self, window):
        assert window.whole
        return self.other


@dataclass(frozen=True)
class PartExtension(Extension):
    payload: ClassVar[type] = Part


@pytest.mark.parametrize("other", [None, Part(other=Part())])
def test_payloads_of_a_video_without_windows_are_their_part_of_it(other):
    model = FakeModel(GaussianTransformer(config(), (PartExtension(),)))
    sample(request(model, payloads=(Part(other=other),)), FakeHost())
    assert [call.payloads for call in model.transformer.calls] == [() if other is None else (other,)] * 6


def test_references_count_when_windows_are_told_from_loops():
    """The end of a looped video leads to its start only where windows were made, which references are no part of."""
    looped = replace(WINDOWS, schedule="uniform_looped")
    for size, want in ((33, True), (41, False), (53, False)):
        result, _ = sample_once(request(image=LONG, context=replace(looped, size=size)), FakeHost())
        assert result["looped"] is want and (result["has_ref"], result["trailing_latents"]) == (3, 2)
