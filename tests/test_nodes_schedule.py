"""Noise levels for ComfyUI's own schedulers, and noise levels in the place of steps."""

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N


def test_a_noise_level_in_the_place_of_a_step():
    (level,) = N["WanVideoSigmaToStep"]().convert(1)
    assert isinstance(level, float) and level == 1.0
    (split,) = N["WanVideoSigmaToStep"]().convert(0.9)
    make = N["WanVideoScheduler"]().process
    first, second = make("euler", 20, 0, split, 5.0)[3], make("euler", 20, split, -1, 5.0)[3]
    assert (first.sigmas[:-1] > 0.9).all() and (second.sigmas <= 0.9).all()
    assert len(first) + len(second) == 20 and 0 < len(first) < 20


@pytest.mark.parametrize("shift", [1.0, 5.0, 0.5])
def test_the_stand_in_for_a_model_has_shifted_noise_levels(shift):
    sampling = N["DummyComfyWanModelObject"]().create(shift)[0].get_model_object("model_sampling")
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    want = 1 / (1 + (1 / t - 1) / shift)
    torch.testing.assert_close(sampling.sigmas.double(), want, rtol=1e-6, atol=1e-7)
    assert sampling.sigma_max == 1 and sampling.sigma_min == sampling.sigmas[0]
    torch.testing.assert_close(sampling.sigma(sampling.timestep(t[[3, 500, -1]])), want[[3, 500, -1]])
    assert [sampling.percent_to_sigma(p) for p in (-1.0, 0.0, 1.0, 2.0)] == [1.0, 1.0, 0.0, 0.0]
    assert sampling.percent_to_sigma(0.25) == pytest.approx(want[749].item())


def test_it_cannot_sample_and_its_shift_is_above_zero():
    node = N["DummyComfyWanModelObject"]
    with pytest.raises(ValueError, match="has no 'latent_format'"):
        node().create(2.0)[0].get_model_object("latent_format")
    for wrong in (0.0, -3.0):
        with pytest.raises(ValueError, match=f"^shift must be above 0, not {wrong}.$"):
            node.VALIDATE_INPUTS(wrong)
        with pytest.raises(ValueError, match="shift must be above 0"):
            node().create(wrong)
