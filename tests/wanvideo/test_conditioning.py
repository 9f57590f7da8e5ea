"""Payloads, steps and windows by themselves."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from contract import ALL_CASES
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


# Systems that share a run with a loop of windows, by a socket of the sampler or through embeds that carry the loop.
IN_LOOPS = (
    "uni3c", "controlnet", "fun_control", "fun_camera", "scail", "longvie2", "mtv_crafter", "steadydancer",
    "one_to_all_poses", "fantasytalking",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_LOOPS)
def test_where_a_loop_reaches_behind_the_video_the_last_frame_stands(name):
    payload = ALL_CASES[name].payload
    behind = payload.window(Window((1, 2, 3), tuple(range(1, 14)), end=3))
    held = payload.window(Window((1, 2, 2), (*range(1, 9), *[8] * 5), total=3))
    for field in fields(payload):
        got, want = getattr(behind, field.name), getattr(held, field.name)
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, field.name
    with pytest.raises(ValueError, match=r"(needs|video has)( at least)? (4|13)\b"):
        payload.window(Window((1, 2, 3), tuple(range(1, 13)), end=4))


def test_places_behind_the_video_by_hand():
    plain = Window((0, 5, 6, 7), tuple(range(17, 26)), leading=1)
    assert (plain.latents_in(6), plain.video_in(5)) == ([0, 5, 6, 7], [4, 5, 6])
    assert plain.pixels_in(20) == list(range(17, 26))
    loop = plain._replace(end=6)
    # All of the video, more than it, and too little.
    assert [loop.latents_in(n) for n in (7, 8, 3)] == [[0, 5, 6, 6], [0, 5, 6, 7], [0, 5, 6, 6]]
    assert [loop.video_in(n) for n in (6, 7, 3)] == [[4, 5, 5], [4, 5, 6], [4, 5, 5]]
    assert loop.pixels_in(21) == [17, 18, 19, *[20] * 6] and loop.pixels_in(30) == list(range(17, 26))
