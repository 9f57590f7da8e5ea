"""ViBT's steps: the paper's form in float64, and a Brownian bridge, whose distribution is known at every time."""

import math

import pytest
import torch
from sampler_stand_in import SHAPE, FakeHost, FakeModel, latents_of, request
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

# Split at a step, too: where the first of two samplers ends, the video is not there yet.
PARTS = [{}, {"end_step": 5}, {"start_step": 5}, {"sigmas": torch.tensor([1.0, 0.7, 0.55, 0.1, 0.04])}]


def schedule(steps=8, **part):
    return make_schedule(ScheduleSpec(name="vibt_unipc", steps=steps, shift=5.0, **part))


@pytest.mark.parametrize("part", PARTS)
def test_steps_equal_the_published_form(part):
    """Time runs from 0, the source, to 1; noise of a step has the variance dt (1 - next) / (1 - now)."""
    plan, seed = schedule(**part), int(torch.randint(2**31, ()))
    generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
    times = (1 - plan.sigmas.double()).tolist()
    x = torch.randn(SHAPE)
    for index, (now, after) in enumerate(zip(times, times[1:], strict=False)):
        velocity, noise = torch.randn(SHAPE), torch.randn(SHAPE, generator=again)
        spread = math.sqrt((after - now) * (1 - after) / (1 - now))
        # The model's velocity points from the target to the source.
        want = x.double() - (after - now) * velocity.double() + spread * noise.double()
        x = plan.step(velocity, index, x, generator)
        torch.testing.assert_close(x.double(), want, rtol=0, atol=2e-6)


def test_the_model_sees_no_time_below_zero():
    assert schedule(sigmas=torch.tensor([1.0, 0.5, 0.0005, 0.0])).timesteps.tolist() == [999, 499, 0]


def test_a_run_is_a_bridge_from_the_source_to_the_target():
    """At time 1 - sigma it is normal around the line between the two, with the variance sigma (1 - sigma)."""
    source, target = torch.randn(2).tolist()
    plan, generator = schedule(), torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    x = torch.full((4, 4, 64, 64), source)
    assert plan.sigmas[0] == 1
    for index, sigma in enumerate(plan.sigmas[:-1].tolist()):
        x = plan.step((x - target) / sigma, index, x, generator)
        after = plan.sigmas[index + 1].item()
        assert float(x.mean()) == pytest.approx(target + after * (source - target), abs=0.02)
        assert float(x.var()) == pytest.approx(after * (1 - after), rel=0.05, abs=1e-9)
    torch.testing.assert_close(x, torch.full_like(x, target), rtol=0, atol=1e-5)


def test_a_sampler_begins_with_the_samples_as_they_are():
    model, source = FakeModel(), torch.randn(1, *SHAPE)
    found = sample(request(model, samples={"samples": source}, schedule=schedule()), FakeHost())
    first = model.transformer.calls[0]
    assert torch.equal(first.latents[0], source[0]) and first.timestep.eq(999).all()
    assert latents_of(found).isfinite().all()
