"""The arithmetic of memory: held to a count of a forward's tensors at true sizes, and what is chosen by it."""

from dataclasses import replace

import pytest
from memory_count import GOALS, ROUTES, SIZES, peaks, shapes_of
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.memory import (
    AT_ONCE,
    WORKSPACES,
    Beside,
    Footprint,
    Precision,
    Work,
    activations,
    held,
)


@pytest.mark.parametrize("spare", [True, False], ids=["pieces", "whole"])
@pytest.mark.parametrize(("name", "route"), [("480p", r) for r in ROUTES] + [("720p", "fp8"), ("infinitetalk", "fp8")])
def test_activations_are_what_is_counted(name, route, spare, monkeypatch):
    attention, precision = ROUTES[route]
    size, more, _ = GOALS[name]
    counted, *_ = peaks(monkeypatch, size, attention=attention, fp8=route != "bf16", spare=spare, **more)
    config, work = WanConfig(**SIZES, in_dim=more.get("in_dim", 16)), Work(21 * size[0] * size[1] // 256)
    assert activations(config, work, precision, AT_ONCE if spare else 0) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("spare", [True, False], ids=["pieces", "whole"])
@pytest.mark.parametrize("route", ROUTES)
def test_longcat_holds_more_of_its_layers(route, spare, monkeypatch):
    sizes, system = dict(dim=4096, ffn_dim=11008, num_heads=32, num_layers=2), (LongCat(width=512),)
    (attention, precision), fp8 = ROUTES[route], route != "bf16"
    counted, *_ = peaks(
        monkeypatch, (480, 832), extensions=system, attention=attention, fp8=fp8, spare=spare, sizes=sizes
    )
    config, work = WanConfig(**sizes, in_dim=16), Work(21 * 480 * 832 // 256)
    precision = replace(precision, **held(shapes_of(config, system), fused=precision.fused))
    assert activations(config, work, precision, AT_ONCE if spare else 0) == pytest.approx(counted, rel=0.05)


def test_twice_the_rows_take_twice_the_activations():
    config = WanConfig(**SIZES)
    one, two = (activations(config, Work(40_000, batch), Precision()) for batch in (1, 2))
    assert 1.95 < two / one <= 2


FOOTPRINT = Footprint(outside=100, blocks=(10,) * 8, all_at_once=70, in_pieces=30)


@pytest.mark.parametrize(
    ("waiting", "bytes_of"), [(0, 100 + 80 + 70), (1, 100 + 70 + 10 + 30), (3, 100 + 50 + 20 + 30), (8, 100 + 20 + 30)]
)
def test_a_peak_is_what_stays_and_slabs_and_activations(waiting, bytes_of):
    assert FOOTPRINT.peak(waiting) == bytes_of + WORKSPACES


def test_models_beside_it_count_whole_or_by_their_slabs():
    two = replace(FOOTPRINT, beside=Beside(30, 5).plus(Beside(10, 3)))
    more = [two.peak(waiting) - FOOTPRINT.peak(waiting) for waiting in (0, 1, 8)]
    assert more == [40, 8, 8] and two.resident_in_pieces - FOOTPRINT.resident_in_pieces == 40
    assert two.least_waiting(two.peak(0)) == 0 and two.least_waiting(two.peak(4)) == 4


@pytest.mark.parametrize(("room", "waiting"), [(250, 0), (210, 0), (209, 3), (200, 3), (199, 4), (150, 8), (149, None)])
def test_as_few_wait_as_the_room_asks_for(room, waiting):
    """Tokens in pieces come first: they cost nothing that can be measured."""
    assert FOOTPRINT.least_waiting(room + WORKSPACES) == waiting
    if waiting:
        assert FOOTPRINT.peak(waiting) <= room + WORKSPACES < FOOTPRINT.peak(waiting - 1)
