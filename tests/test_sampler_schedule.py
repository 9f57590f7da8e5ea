"""A connected schedule and the sampler's own widgets."""

import pytest
import torch
from wanvideo_wrapper.nodes_sampler import _connected
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

PART = {"sigmas": None, "denoise_strength": 1.0, "start_step": 0, "end_step": -1}


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize(
    "part", [{"denoise_strength": 0.4}, {"start_step": 2, "end_step": 7}, {"sigmas": torch.tensor([0.9, 0.5, 0.0])}]
)
def test_the_part_that_the_sampler_chooses_holds_for_a_connected_schedule(name, part):
    spec = {"name": name, "steps": 10, "shift": 4.0}
    got = _connected(make_schedule(ScheduleSpec(**spec)), 30, 5.0, {**PART, **part})
    want = make_schedule(ScheduleSpec(**spec, **part))
    assert torch.equal(got.sigmas, want.sigmas) and got.spec.steps == 10


def test_without_a_choice_the_schedule_is_taken_as_it_is():
    schedule = make_schedule(ScheduleSpec(name="euler", steps=4, shift=3.0, denoise_strength=0.5))
    assert _connected(schedule, 4, 3.0, PART) is schedule
