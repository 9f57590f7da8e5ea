"""Payloads, steps and windows by themselves."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step, Window
from wanvideo_wrapper.wanvideo.frames import latent_frames, pixel_frames, round_frames


@dataclass(frozen=True)
class Several(Payload):
    rows: torch.Tensor
    scale: torch.Tensor
    parts: tuple[torch.Tensor, ...] = ()
    name: str = "a"
    counts: torch.Tensor | None = None
    needs: ClassVar[str] = "none"


def test_moving_casts_batches_of_numbers_and_nothing_else():
    payload = Several(torch.randn(1, 3), torch.tensor(2.0), (torch.randn(1, 2),), counts=torch.tensor([1, 2]))
    moved = payload.to(torch.device("cpu"), torch.bfloat16)
    assert moved.rows.dtype == moved.parts[0].dtype == torch.bfloat16
    assert moved.scale.dtype == torch.float32 and moved.counts.dtype == torch.int64 and moved.name == "a"


def test_stacking_joins_rows():
    one, two = (Several(torch.randn(1, 3), torch.tensor(2.0), (torch.ones(2),)) for _ in range(2))
    assert torch.equal(one.stack([two]).rows, torch.cat((one.rows, two.rows)))
    assert one.stack([one, one]) is one


@pytest.mark.parametrize(
    "change",
    [
        {"scale": torch.tensor(3.0)}, {"scale": 2.0}, {"name": "b"}, {"parts": (torch.zeros(2),)}, {"parts": ()},
        {"parts": None}, {"counts": 1},
    ],
)  # fmt: skip
def test_what_has_no_rows_must_be_equal(change):
    fields = {"rows": torch.randn(1, 3), "scale": torch.tensor(2.0), "parts": (torch.ones(2),)}
    with pytest.raises(ValueError, match=f"'{next(iter(change))}'.*batched_cfg off"):
        Several(**fields).stack([Several(**{**fields, **change})])


def test_a_payload_asks_for_nothing_that_it_does_not_say():
    payload = Several(torch.randn(1, 3), torch.tensor(2.0))
    assert not any((payload.optional, payload.encoded, payload.fills_channels, payload.holds_given, payload.together))
    assert payload.part is None and payload.fills(Step()) and payload.guidance(5.0, Step()) is None
    part = Window((0,), pixels=(0,))
    assert not part.whole and payload.window(part) is payload and payload.without(frozenset({"text"})) is payload
    assert payload.fitted(None) is payload and payload.joined((payload,)) == (payload,)
    with payload.active(swapped=True):
        pass


def test_a_lone_step_is_the_first_of_one():
    assert Step() == Step(index=0, total=1, in_run=0) and Step().percent == 0


def test_progress_ends_at_the_last_step():
    assert [Step(index=i, total=5).percent for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [Step(index=i, total=2).percent for i in range(2)] == [0, 1]


def test_a_step_is_within_a_part_of_the_schedule():
    inside = [Step(index=i, total=10).within(0.2, 0.5) for i in range(10)]
    assert inside == [False, False, True, True, True, True, False, False, False, False]
    assert Step(index=0, total=1).within(0.0, 1.0) and not Step(index=3, total=10, in_run=0).within(0.0, 0.2)


def test_places_of_a_window_in_the_video_itself():
    window = Window((0, 3, 4, 9), pixels=(), leading=1, trailing=1, total=10)
    assert window.video == (2, 3) and window.video_total == 8
    assert Window((2, 5), pixels=()).video == (2, 5) and Window((2, 5), pixels=()).video_total is None


def test_pixel_frames_of_a_window():
    assert pixel_frames((0, 1, 2)) == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert pixel_frames((3, 4)) == (12, 13, 14, 15, 16)
    assert pixel_frames((7, 0, 1)) == (28, 0, 0, 0, 0, 1, 2, 3, 4)


def test_references_stand_still():
    window = Window((0, 1, 2, 3), tuple(range(5)), leading=1, trailing=1)
    assert window.sounding == (0, 0, 0, 0, 0, 1, 2, 3, 4)
    assert len(window.sounding) == 1 + 4 * (4 - 1 - window.trailing)


def test_counts_of_the_vae():
    assert [latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [round_frames(n) for n in (1, 4, 5, 83)] == [1, 1, 5, 81]
