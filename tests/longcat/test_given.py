"""A run of LongCat goes on from given latents: they stay, at time 0; a reference in front is not in the result."""

import pytest
import torch
from sampler_stand_in import SHAPE, FakeHost, FakeModel, GaussianTransformer, config, latents_of, rand, request
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat.given import Continuation, GivenFrames
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample

FRAMES = SHAPE[1]


def model():
    return FakeModel(GaussianTransformer(config(), (LongCat(width=8),)))


def image_of(**more):
    return ImageEmbeds(latent_shape=SHAPE, num_frames=4 * (FRAMES - 1) + 1, **more)


def test_extra_latents_are_what_it_goes_on_from():
    before = rand(1, 16, 2, *SHAPE[2:], seed=5)
    asked = request(model(), image=image_of(given_latents=((0, before),)))
    found = latents_of(sample(asked, FakeHost()))
    torch.testing.assert_close(found[:, :2], before[0])
    free = latents_of(sample(request(model(), image=image_of()), FakeHost()))
    torch.testing.assert_close(found[:, 2:], free[:, 2:])
    for call, timestep in zip(asked.model.transformer.calls, asked.schedule.timesteps, strict=True):
        assert call.payloads == (GivenFrames(frames=2),)
        torch.testing.assert_close(call.latents[0, :, :2], before[0])
        assert call.timestep[0].tolist() == [0.0, 0.0, *[float(timestep)] * (FRAMES - 2)]


@pytest.mark.parametrize("index", [1, -1])
def test_latents_elsewhere_are_refused(index):
    asked = request(model(), image=image_of(given_latents=((index, rand(1, 16, 1, *SHAPE[2:])),)))
    with pytest.raises(ValueError, match="goes on from latents at the start of a video"):
        sample(asked, FakeHost())


def test_a_reference_is_in_front_of_the_run_and_not_in_its_result():
    reference, before = rand(16, 1, *SHAPE[2:], seed=5), rand(16, 1, *SHAPE[2:], seed=6)
    image = image_of(
        payloads=(GivenFrames(frames=2, apart=1, position=4),), modifiers=(Continuation(before, reference),)
    )
    asked = request(model(), image=image)
    found, estimate = sample(asked, FakeHost())
    for result in (found, estimate):
        assert result["samples"].shape == (1, *SHAPE)
        torch.testing.assert_close(result["samples"][0, :, :1], before)
    free = latents_of(sample(request(model(), image=image_of()), FakeHost()))
    torch.testing.assert_close(latents_of((found,))[:, 1:], free[:, 1:])
    for call in asked.model.transformer.calls:
        torch.testing.assert_close(call.latents[0, :, :2], torch.cat((reference, before), dim=1))
        assert call.timestep[0, :2].tolist() == [0.0, 0.0] and (call.timestep[0, 2:] > 0).all()


def test_a_mask_and_a_reference_are_refused():
    image = image_of(
        payloads=(GivenFrames(frames=1, position=4),), modifiers=(Continuation(None, rand(16, 1, *SHAPE[2:])),)
    )
    samples = {"samples": rand(1, *SHAPE), "noise_mask": torch.ones(FRAMES, *SHAPE[2:])}
    with pytest.raises(ValueError, match="mask and a reference latent of LongCat do not go together"):
        sample(request(model(), image=image, samples=samples), FakeHost())
