"""LongCat-Video's transformer equals a float64 form written from the authors' code, with given frames and without."""

import pytest
import torch
from contract import HEIGHT, WIDTH, build, inputs
from float64_longcat import CONFIG, FRAMES, GRID, ExactLongCat, all_seen
from float64_wan import places, relative
from tiny_runs import Runs
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat.given import GivenFrames
from wanvideo_wrapper.wanvideo.conditioning import Window


def case(payload, text_tokens=3):
    _, model = build(LongCat(width=8), config=CONFIG)
    times = torch.full((1, FRAMES), 700.0)
    times[:, : payload.frames if payload else 0] = 0
    latents, text = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH), torch.randn(text_tokens, 8)
    given = inputs(*((payload,) if payload else ()), seed=1)
    given = type(given)(**{**given.__dict__, "latents": latents, "timestep": times, "text": (text,)})
    return model, given, text


@pytest.mark.parametrize("text_tokens", [3, 4])
def test_text_to_video(text_tokens):
    model, given, text = case(None, text_tokens)
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 0, all_seen(), places(*map(range, GRID)))
    assert relative(model(given), want) < 1e-5


def test_one_time_is_that_of_all_frames():
    model, given, _ = case(None)
    one = type(given)(**{**given.__dict__, "timestep": given.timestep[:, 0]})
    assert relative(model(one), model(given).double()) < 1e-6


def test_given_frames_see_each_other_alone_and_no_prompt():
    model, given, text = case(GivenFrames(frames=2))
    seen = all_seen()
    seen[:2, 2:] = False
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 2, seen, places(*map(range, GRID)))
    assert relative(model(given), want) < 1e-5


def test_a_reference_is_apart_and_has_a_place_in_the_video():
    model, given, text = case(GivenFrames(frames=2, apart=1, position=9, unseeing=(3, 4)))
    seen = all_seen()
    seen[0, 1:] = seen[1, 0] = seen[1, 2:] = seen[3, 0] = False
    positions = places((9,), *map(range, GRID[1:])) + places(range(FRAMES - 1), *map(range, GRID[1:]))
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 2, seen, positions)
    assert relative(model(given), want) < 1e-5


def test_a_file_of_it_is_loaded_and_sampled(tmp_path):
    with Runs(tmp_path, tiny.transformer(in_dim=16, extensions=(LongCat(width=16),))) as runs:
        assert LongCat(width=16) in runs.model.transformer.extensions
        one, other = (runs.sample(seed=seed) for seed in (1, 2))
    assert one.isfinite().all() and not torch.equal(one, other)


def test_a_video_of_given_frames_alone_and_a_part_of_one_are_refused():
    model, given, _ = case(GivenFrames(frames=FRAMES))
    with pytest.raises(ValueError, match="All 5 latent frames of the video are given"):
        model(given)
    with pytest.raises(ValueError, match="not in context windows"):
        GivenFrames(frames=1).window(Window((0, 1), (0, 1, 2, 3, 4)))
