"""Time-to-move against a loop over the steps, on a model whose velocity is known."""

import pytest
import torch
from sampler_stand_in import MEAN, SHAPE, SPREAD, FakeHost, FakeModel, latents_of, rand, request, schedule
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample

STEPS = 6
REFERENCE = rand(1, *SHAPE, seed=7)
MASK = (rand(9, 32, 48, seed=8) > 0).float()


def embeds(start, end, reference=REFERENCE, mask=MASK):
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9)
    return N["WanVideoAddTTMLatents"]().add(image, {"samples": reference}, mask, start, end)[0]


def looped(start, end, first=0, last=STEPS, name="euler"):
    """Sampling of steps `first` to `last` of a schedule with the reference, as the authors write it."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42)).double()
    grid, times = schedule(name, STEPS).sigmas.double(), schedule(name, STEPS).timesteps.double() / 1000
    reference, mask = REFERENCE[0].double(), torch.stack([MASK[4 * f, ::8, ::8] for f in range(3)]).double()
    begin = max(start, first)
    latents = (1 - times[begin]) * reference + times[begin] * noise
    for step in range(begin, last):
        sigma = times[step]
        slope = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        velocity = -MEAN + slope * (latents - (1 - sigma) * MEAN)
        latents = latents + velocity * (grid[step + 1] - grid[step])
        if step < end:
            level = times[step + 1] if step + 1 < STEPS else 0.0
            latents = latents * (1 - mask) + mask * ((1 - level) * reference + level * noise)
    return latents


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 3), (-1, 4), (2, 6), (5, 9)])
def test_the_reference_leads(start, end):
    model = FakeModel()
    got = latents_of(sample(request(model, image=embeds(start, end), schedule=schedule("euler", STEPS)), FakeHost()))
    torch.testing.assert_close(got.double(), looped(start, end), rtol=1e-4, atol=1e-4)
    assert [call.step.index for call in model.transformer.calls] == list(range(max(start, 0), STEPS))


@pytest.mark.parametrize("split", [1, 2, 4])
def test_of_two_samplers_the_second_goes_on_where_the_mask_is_free(split):
    image = embeds(0, 2)
    first, _ = sample(request(image=image, schedule=schedule("euler", STEPS, end_step=split)), FakeHost())
    torch.testing.assert_close(first["samples"][0].double(), looped(0, 2, last=split), rtol=1e-4, atol=1e-4)
    second = request(image=image, schedule=schedule("euler", STEPS, start_step=split), samples=first, seed=42)
    got = latents_of(sample(second, FakeHost())).double()
    want = looped(0, 2) if split >= 2 else looped(0, 2, first=split)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_noise_is_that_of_the_models_timestep():
    model = FakeModel()
    sample(request(model, image=embeds(0, 3), schedule=schedule("unipc", STEPS)), FakeHost())
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    time = schedule("unipc", STEPS).timesteps[0] / 1000
    torch.testing.assert_close(model.transformer.calls[0].latents[0], (1 - time) * REFERENCE[0] + time * noise)
    inside = torch.stack([MASK[4 * f, ::8, ::8] for f in range(3)]).bool().expand(SHAPE)
    time = schedule("unipc", STEPS).timesteps[2] / 1000
    want = (1 - time) * REFERENCE[0] + time * noise
    torch.testing.assert_close(model.transformer.calls[2].latents[0][inside], want[inside])
    assert (model.transformer.calls[2].latents[0] - want)[~inside].abs().max() > 0.01


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="end_step"):
        embeds(3, 3)
    with pytest.raises(ValueError, match="None of 6 steps"):
        sample(request(image=embeds(6, 7)), FakeHost())
    masks = (MASK[:5], MASK[:, :16], MASK[:, :4, :6])
    for wrong in ({"reference": REFERENCE[:, :, :2]}, *({"mask": mask} for mask in masks)):
        with pytest.raises(ValueError, match="same width, height and number of frames"):
            sample(request(image=embeds(0, 2, **wrong)), FakeHost())


def test_latents_of_the_other_vae_are_half_as_large():
    image = embeds(0, 2, reference=rand(1, 48, 3, 2, 3), mask=MASK)
    assert image.modifiers[0].mask.shape == (1, 3, 2, 3)
    assert torch.equal(image.modifiers[0].mask[0, 1], MASK[4, ::16, ::16])


def test_a_second_node_takes_the_place_of_the_first():
    mask = torch.ones(9, 32, 48)
    (again,) = N["WanVideoAddTTMLatents"]().add(embeds(1, 4), {"samples": REFERENCE}, mask, 2, 5)
    (motion,) = again.modifiers
    assert (motion.start_step, motion.end_step) == (2, 5)
