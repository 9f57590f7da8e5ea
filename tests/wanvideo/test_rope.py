"""Rotary embedding against complex arithmetic in float64."""

import math

import pytest
import torch
from wanvideo_wrapper.kernels.rope import apply_rope
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.rope import axis_sizes, rope_table


def complex_rope(x, grid, riflex=0, scales=(1, 1, 1)):
    frames, height, width = grid
    size = x.shape[-1]
    parts = (size - 4 * (size // 6), 2 * (size // 6), 2 * (size // 6))
    out = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()).clone()
    token = 0
    for f in range(frames):
        for h in range(height):
            for w in range(width):
                angles = []
                for axis, (position, part) in enumerate(zip((f, h, w), parts, strict=True)):
                    for j in range(part // 2):
                        freq = (10000.0 * scales[axis]) ** (-2 * j / part)
                        if axis == 0 and riflex and j == riflex - 1:
                            freq = 0.9 * 2 * math.pi / frames
                        angles.append(position * freq)
                turn = torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles).double())
                out[:, token] *= turn
                token += 1
    return torch.view_as_real(out).flatten(-2)


@pytest.mark.parametrize("size", [12, 64, 128])
@pytest.mark.parametrize("riflex", [0, 1, 2])
def test_equals_complex_rotation(size, riflex):
    grid = (3, 2, 4)
    x = torch.randn(2, 24, 3, size)
    got = apply_rope(x, rope_table(grid, size, riflex_index=riflex))
    want = complex_rope(x, grid, riflex)
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("scales", [(3, 1, 1), (1, 0.5, 20)])
def test_bases_are_scaled_axis_by_axis(scales):
    x = torch.randn(2, 24, 3, 24)
    got = apply_rope(x, rope_table((3, 2, 4), 24, base_scales=scales, riflex_index=2))
    want = complex_rope(x, (3, 2, 4), 2, scales)
    assert (got - want).norm() / want.norm() < 1e-6


def test_a_model_turns_by_scaled_bases_inside_the_context_only():
    model = WanModel(WanConfig(dim=48, ffn_dim=8, num_heads=2, num_layers=1, text_dim=8))
    before = model.rope((3, 2, 4))
    with pytest.raises(KeyError), model.turning((2.0, 3.0, 4.0)):
        assert torch.equal(model.rope((3, 2, 4)), rope_table((3, 2, 4), 24, base_scales=(2.0, 3.0, 4.0)))
        raise KeyError
    assert torch.equal(model.rope((3, 2, 4)), before)
    assert not torch.equal(before, rope_table((3, 2, 4), 24, base_scales=(2.0, 3.0, 4.0)))


def test_positions_of_a_model_are_those_of_the_table():
    model = WanModel(WanConfig(dim=48, ffn_dim=8, num_heads=2, num_layers=1, text_dim=8))
    grid, more = (2, 2, 3), {"start": (3, 1, 2), "riflex_index": 2, "riflex_frames": 3}
    assert torch.equal(model.rope(grid), rope_table(grid, 24))
    assert torch.equal(model.rope(grid, **more), rope_table(grid, 24, **more))


def test_axes_fill_the_head():
    assert axis_sizes(128) == (44, 42, 42)
    assert all(sum(axis_sizes(d)) == d for d in range(2, 258, 2))


def test_index_out_of_range_is_named():
    with pytest.raises(ValueError, match="riflex_freq_index"):
        rope_table((2, 2, 2), 128, riflex_index=23)


def test_frames_behind_the_video_turn_at_its_speed():
    """RIFLEx slows by the length of the video, whatever else lies behind it."""
    whole = rope_table((5, 2, 3), 24, riflex_index=2, riflex_frames=3)
    assert torch.equal(whole[: 3 * 6], rope_table((3, 2, 3), 24, riflex_index=2))
    behind = rope_table((2, 2, 3), 24, start=(3, 0, 0), riflex_index=2, riflex_frames=3)
    assert torch.equal(whole[3 * 6 :], behind)
    assert not torch.equal(behind, rope_table((2, 2, 3), 24, start=(3, 0, 0), riflex_index=2))


def test_the_tables_of_a_forward_are_made_once():
    rope_table.cache_clear()
    tables = [[rope_table((2, 2, columns), 12) for columns in range(1, 5)] for _ in range(2)]
    assert all(first is again for first, again in zip(*tables, strict=True))
