"""Pusa against a loop over steps and frames in float64, on a model whose velocity is known."""

import numpy as np
import pytest
import torch
from sampler_stand_in import MEAN, SHAPE, SPREAD, FakeHost, FakeModel, latents_of, rand, request, schedule
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.pusa.noise import FrameNoise
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample

STEPS = 6


def embeds(multipliers, steps=-1, given=((0, 1), (-1, 1))):
    parts = tuple((at, rand(1, 16, count, 4, 6, seed=9 + at)) for at, count in given)
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, given_latents=parts)
    return N["WanVideoAddPusaNoise"]().add(image, multipliers, steps)[0]


def looped(image, parts, noisy_steps):
    """What Pusa's scheduler makes: sigma of a frame is that of the grid's time nearest to its own, times its part."""
    generator = torch.Generator().manual_seed(42)
    latents = torch.randn(SHAPE, generator=generator).double()
    for at, given in image.given_latents:
        latents[:, at] = given[0, :, 0].double()
    grid = np.linspace(1, 0, STEPS + 1)
    grid = 3.0 * grid / (1 + 2.0 * grid)
    for step in range(STEPS):
        times = [grid[step]] * 3
        for frame, part in parts.items():
            times[frame] = grid[step] * part
            if step < noisy_steps and part > 0:
                noise = torch.randn(1, *SHAPE, generator=generator)[0, :, frame].double()
                latents[:, frame] = (1 - grid[step] * part) * latents[:, frame] + grid[step] * part * noise
        for frame in range(3):
            sigma, part = times[frame], parts.get(frame, 1.0)
            velocity = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
            velocity = -MEAN + velocity * (latents[:, frame] - (1 - sigma) * MEAN)
            nearest = int(np.abs(grid[:-1] - sigma).argmin())
            if sigma > 0:
                latents[:, frame] += velocity * (grid[nearest + 1] - grid[nearest]) * part
    return latents


@pytest.mark.parametrize(
    ("multipliers", "parts", "steps"),
    [
        ([0.3, 0.0], {0: 0.3, 2: 0.0}, -1),
        ([0.45, 0.7, 1.0], {0: 0.45, 2: 1.0}, -1),
        ([0.3, 0.8], {0: 0.3, 2: 0.8}, 2),
        (0.25, {0: 0.25, 2: 0.25}, 0),
        (0.0, {0: 0.0, 2: 0.0}, 3),
    ],
)
def test_frames_move_as_their_part_of_the_noise_says(multipliers, parts, steps):
    image = embeds(multipliers, steps)
    model = FakeModel()
    got = latents_of(sample(request(model, image=image, schedule=schedule("flowmatch_pusa", STEPS)), FakeHost()))
    want = looped(image, parts, STEPS if steps < 0 else steps)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    for frame, part in parts.items():
        given = dict(image.given_latents)[0 if frame == 0 else -1]
        assert torch.allclose(got[:, frame], given[0, :, 0]) == (part == 0)


def test_what_does_not_fit_is_named(caplog):
    with pytest.raises(ValueError, match="scheduler 'flowmatch_pusa', not 'euler'"):
        sample(request(image=embeds(0.2)), FakeHost())
    with pytest.raises(ValueError, match="1 numbers for 2|2 numbers for 3"):
        three = embeds([0.1, 0.2], given=((0, 1), (1, 1), (2, 1)))
        sample(request(image=three, schedule=schedule("flowmatch_pusa")), FakeHost())
    with pytest.raises(ValueError, match="one is 1.5"):
        embeds([0.5, 1.5])
    sample(request(image=embeds(0.2, given=()), schedule=schedule("flowmatch_pusa")), FakeHost())
    assert "has no effect" in caplog.text
    assert embeds(0.2).modifiers == (FrameNoise((0.2,), -1),)
    (again,) = N["WanVideoAddPusaNoise"]().add(embeds(0.2), 0.6, 3)
    assert again.modifiers == (FrameNoise((0.6,), 3),)
