"""What payloads make of one another, and what changes the start of a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from sampler_stand_in import SHAPE, FakeHost, FakeModel, latents_of, rand, request, schedule
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample


@dataclass(frozen=True)
class Colour(Payload):
    needs: ClassVar[str] = "none"
    name: str = "grey"


@dataclass(frozen=True)
class Painter(Payload):
    needs: ClassVar[str] = "none"

    def joined(self, payloads):
        if not any(isinstance(p, Colour) for p in payloads):
            raise ValueError("There is no colour.")
        return tuple(replace(p, name="red") for p in payloads if isinstance(p, Colour))


def test_a_payload_makes_something_of_the_others():
    model = FakeModel()
    model.payloads = (Painter(),)
    embeds = ImageEmbeds(latent_shape=SHAPE, num_frames=9, payloads=(Colour(),))
    assert request(model, image=embeds).all_payloads == (Colour("red"),)
    with pytest.raises(ValueError, match="no colour"):
        sample(request(model), FakeHost())


class Frozen:
    """Puts its latents back after every step."""

    def __init__(self, latents):
        self.latents = latents

    def before(self, latents, index):
        return latents

    def after(self, latents, index):
        return self.latents


@dataclass(frozen=True)
class FromTwice(Modifier):
    """Starts at `factor` times the latents, and holds the noise."""

    factor: float = 2.0

    def begin(self, start, schedule, generator):
        assert len(schedule) == 6 and generator.initial_seed() == 42
        return start._replace(latents=self.factor * start.latents, hooks=(*start.hooks, Frozen(start.noise)))


def test_modifiers_of_embeds_change_the_start_from_the_inside():
    embeds = ImageEmbeds(latent_shape=SHAPE, num_frames=9, modifiers=(FromTwice(3.0),))
    model, noise = FakeModel(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    got = latents_of(sample(request(model, image=embeds, modifiers=(FromTwice(),)), FakeHost()))
    torch.testing.assert_close(model.transformer.calls[0].latents[0], 6.0 * noise)
    assert torch.equal(got, noise)


def test_noise_is_told_from_samples():
    given = rand(1, *SHAPE, seed=3)
    embeds = ImageEmbeds(latent_shape=SHAPE, num_frames=9, modifiers=(FromTwice(),))
    model, noise = FakeModel(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    got = latents_of(sample(request(model, image=embeds, samples={"samples": given}), FakeHost()))
    torch.testing.assert_close(model.transformer.calls[0].latents, 2.0 * given)
    assert torch.equal(got, noise)


@dataclass(frozen=True)
class Changed(Modifier):
    """The velocity as `change` makes it."""

    change: Callable

    def around_velocity(self, velocity):
        return lambda *given: self.change(velocity(*given))


def test_modifiers_change_the_velocity_from_the_inside():
    asked = request(schedule=schedule(steps=1), modifiers=(Changed(lambda v: 2 * v), Changed(lambda v: v + 1)))
    got = latents_of(sample(asked, FakeHost()))
    transformer, sigmas = asked.model.transformer, asked.schedule.sigmas
    (call,) = transformer.calls
    torch.testing.assert_close(got, (call.latents + 2 * (transformer(call) + 1) * (sigmas[1] - sigmas[0]))[0])


@dataclass(frozen=True)
class Slowed(Modifier):
    def begin(self, start, schedule, generator):
        return start._replace(frame_times={1: 0.25})


def test_a_frame_may_have_a_part_of_the_time():
    model = FakeModel()
    sample(request(model, modifiers=(Slowed(),)), FakeHost())
    for call, timestep in zip(model.transformer.calls, schedule().timesteps, strict=True):
        torch.testing.assert_close(call.timestep, torch.stack((timestep, timestep / 4, timestep))[None])


def test_a_loop_has_no_start_to_change():
    embeds = ImageEmbeds(latent_shape=SHAPE, num_frames=9, modifiers=(FromTwice(),), loop=SimpleNamespace(run=None))
    with pytest.raises(ValueError, match="loop of windows"):
        sample(request(image=embeds), FakeHost())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_later_start_of_a_schedule(steps):
    whole = schedule("euler", start_step=1)
    later = whole.later(steps)
    assert torch.equal(later.sigmas, whole.sigmas[steps:]) and torch.equal(later.timesteps, whole.timesteps[steps:])
    assert later.places()[0].index == 1 + steps and later.total == 6 == len(later.all_timesteps)
    assert torch.equal(later.all_timesteps[1 + steps :], later.timesteps)
    x, v = rand(*SHAPE), rand(*SHAPE, seed=1)
    moved = later.step(v, 0, x, torch.Generator())
    torch.testing.assert_close(moved, x + v * (later.sigmas[1] - later.sigmas[0]))


def test_no_step_left():
    with pytest.raises(ValueError, match="None of 5 steps"):
        schedule("euler", start_step=1).later(5)
