"""Turning the video in every step, against a loop that counts the shift on as it goes."""

import pytest
import torch
from tiny_runs import STEPS, Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.video_loop.shift import LatentShift
from wanvideo_wrapper.wanvideo.conditioning import Step

FRAMES = 5


def frame_by_frame(latents, timestep, step):
    """A velocity that depends on the place of the frame, its timestep and the step."""
    place = torch.arange(latents.shape[1], dtype=latents.dtype)[None, :, None, None]
    time = timestep.reshape(-1, 1, 1) if timestep.dim() else timestep
    return latents * (1 + place) + 0.01 * time * place**2 + step.index


@pytest.mark.parametrize("skip", [0, 1, 2, 6])
@pytest.mark.parametrize("percents", [(0.0, 1.0), (0.25, 0.7), (0.5, 0.5)])
@pytest.mark.parametrize("first", [0, 3])
def test_each_step_of_the_range_turns_one_skip_further(skip, percents, first):
    total, shift = 10, 0
    settings = LatentShift(skip=skip, start_percent=percents[0], end_percent=percents[1])
    velocity = settings.around_velocity(frame_by_frame)
    for index in range(first, total):
        step = Step(index=index, total=total, in_run=index - first)
        latents = torch.randn(16, FRAMES, 4, 4, generator=torch.Generator().manual_seed(index)).double()
        timestep = torch.tensor(900.0 - index, dtype=torch.float64)
        want = frame_by_frame(latents, timestep, step)
        if percents[0] <= index / total <= percents[1]:
            order = [(frame + shift) % FRAMES for frame in range(FRAMES)]
            turned = frame_by_frame(latents[:, order], timestep, step)
            want = torch.stack([turned[:, order.index(frame)] for frame in range(FRAMES)], dim=1)
            shift = (shift + skip) % FRAMES
        torch.testing.assert_close(velocity(latents, timestep, step), want, rtol=1e-12, atol=1e-12)


def test_timesteps_of_single_frames_turn_with_them():
    velocity = LatentShift(skip=2).around_velocity(lambda x, timestep, _: timestep[None, :, None, None] + 0 * x)
    timestep = torch.tensor([0.0, 300.0, 500.0, 700.0, 900.0])
    got = velocity(torch.randn(16, FRAMES, 4, 4), timestep, Step(index=1, total=4, in_run=1))
    assert torch.equal(got[0, :, 0, 0], timestep)


def test_the_node():
    assert N["WanVideoLoopArgs"]().process(3, 0.1, 0.9) == (LatentShift(skip=3, start_percent=0.1, end_percent=0.9),)


def test_a_run_of_the_sampler(tmp_path):
    with Runs(tmp_path) as runs:
        plain, looped = runs.sample(), runs.sample(loop_args=LatentShift(skip=1))
        assert looped.isfinite().all() and (plain - looped).abs().max() > 1e-3
        assert torch.equal(runs.sample(loop_args=LatentShift(skip=3)), plain), "three latent frames turn to themselves"
        last = LatentShift(skip=1, start_percent=(STEPS - 1) / STEPS)
        assert torch.equal(runs.sample(loop_args=last), plain), "the first step of the range is not turned"


def test_results_say_that_they_are_a_ring():
    def run(request, host):
        return {"samples": request}, {"samples": host}

    results = LatentShift().around_run(run)(1, 2)
    assert results == ({"samples": 1, "looped": True}, {"samples": 2, "looped": True})
