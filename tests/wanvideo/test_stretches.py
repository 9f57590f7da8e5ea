"""Pieces of the tokens cover all of them once, and results are put together as they came."""

from dataclasses import replace

import pytest
import torch
from contract import build, inputs
from hypothesis import given
from hypothesis import strategies as st
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.wanvideo.modules import block
from wanvideo_wrapper.wanvideo.modules.stretches import parts_of, stretched, stretches


@given(st.integers(1, 40_000), st.integers(1, 60))
def test_pieces_follow_each_other_and_none_is_empty(count, parts):
    parts = min(parts, count)
    pieces = stretches(count, parts)
    assert len(pieces) == parts and pieces[0].start == 0 and pieces[-1].stop == count
    assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(piece.start < piece.stop for piece in pieces)


@given(st.integers(1, 200_000))
def test_no_piece_is_longer_than_asked(count):
    pieces = stretches(count, parts_of(count, 8192))
    assert max(piece.stop - piece.start for piece in pieces) <= 8192
    assert all(piece.start % 64 == 0 for piece in pieces)
    assert parts_of(count, 0) == 1


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_results_are_whole(parts):
    x = torch.randn(2, 11, 32)
    assert torch.equal(stretched(lambda t: x[:, t] * 2, 11, parts), x * 2)
    rows, want = stretched(lambda t: quantize(x[:, t]), 11, parts), quantize(x)
    assert torch.equal(rows.values.float(), want.values.float()) and torch.equal(rows.scale, want.scale)
    assert (rows.features, rows.dtype) == (want.features, want.dtype)


@pytest.mark.parametrize(("by_frame", "want"), [(False, [1, 1, 3, 3]), (True, [3, 3, 3, 3])])
def test_the_modulation_of_self_attention_is_in_pieces_only_where_each_token_has_its_own(by_frame, want, monkeypatch):
    """Elsewhere it is small, and putting pieces together would be a pass over memory more."""
    seen = []

    def spied(function, count, parts):
        seen.append(parts)
        return stretched(function, count, parts)

    monkeypatch.setattr(block, "stretched", spied)
    given, (_, model) = inputs(), build()
    if by_frame:
        given = replace(given, timestep=torch.rand(1, 3))
    with model.sparing(5):
        model(given)
    assert seen == want * 3
