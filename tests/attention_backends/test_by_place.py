"""Attention that depends on where tokens lie: Radial Attention and UltraViCo, against their definitions by token."""

import pytest
import torch
from layouts import relative
from test_attention import formula
from wanvideo_wrapper.attention_backends.radial import RadialAttention, allowed, block_table
from wanvideo_wrapper.attention_backends.ultravico import TRAINED_FRAMES, UltraVico

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def rule(i, r, j, c, places, block, decay):
    """Whether place r of frame i attends to place c of frame j."""
    distance = abs(i - j)
    if j == 0 or distance == 0:
        return True
    if distance == 1:
        return abs(r - c) <= places // 2
    length = 2 ** places.bit_length() / 2 ** distance.bit_length()
    if length < block and distance % int(block / length):
        return False
    return abs(r - c) <= max(length * decay, block)


@pytest.mark.parametrize(("grid", "block", "decay"), [((9, 3, 4), 2, 0.5), ((6, 5, 5), 8, 1.0), ((20, 1, 3), 4, 0.2)])
def test_tokens_of_the_radial_rule(grid, block, decay):
    frames, places = grid[0], grid[1] * grid[2]
    total = frames * places + 3
    want = torch.ones(total, total, dtype=torch.bool)
    for q in range(frames * places):
        for k in range(frames * places):
            want[q, k] = rule(q // places, q % places, k // places, k % places, places, block, decay)
    assert torch.equal(allowed(torch.arange(total), grid, total, block=block, decay=decay), want)


@pytest.mark.parametrize("block", [4, 8])
def test_blocks_that_are_half_allowed(block):
    grid, total = (9, 3, 5), 9 * 15 + 2
    tokens = allowed(torch.arange(total), grid, total, block=block, decay=0.5)
    table = block_table(grid, total, block, 0.5, CPU)
    for a in range(len(table)):
        for b in range(len(table)):
            share = tokens[a * block : (a + 1) * block, b * block : (b + 1) * block].float().mean()
            assert bool(table[a, b]) == (a == b or float(share) >= 0.5)


def test_radial_attention_grows_sparser_with_length():
    shares = [block_table((frames, 8, 16), frames * 128, 16, 0.2, CPU).float().mean() for frames in (3, 9, 27)]
    assert shares[0] > shares[1] > shares[2] and shares[2] < 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("block", [64, 128])
def test_radial_attention_against_a_dense_mask(device, extra, block):
    grid = (7, 9, 12)
    total = 7 * 108 + extra
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(2, total, 2, 64, device=device, dtype=dtype) for _ in range(3))
    radial = RadialAttention(decay=0.2, block=block).on_grid(grid)
    before = [t.clone() for t in (q, k, v)]
    got = radial(q, k, v)
    mask = block_table(grid, total, block, 0.2, q.device).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert not bool(mask.all())
    tolerance = 1e-5 if device == "cpu" else 1e-2
    assert relative(got, formula(q, k, v, mask[:total, :total])) < tolerance
    assert got.is_contiguous() and all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    everything = RadialAttention(block=block, everything=True).on_grid(grid)
    assert relative(everything(q, k, v), formula(q, k, v)) < tolerance


def ultravico(q, k, v, places, alpha):
    """The definition, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k = k - k.mean(2, keepdim=True)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            if abs(i - j) > places * TRAINED_FRAMES / 2:
                scores[..., i, j] = torch.where(scores[..., i, j] > 0, scores[..., i, j] * alpha, scores[..., i, j])
            if i <= places and j > places * TRAINED_FRAMES:
                scores[..., i, j] = -1e4
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0])
def test_ultravico_against_its_definition(device, alpha):
    grid, total = (24, 1, 5), 120
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, total, 2, 64, device=device, dtype=dtype) + 0.3 for _ in range(3))
    before = k.clone()
    got = UltraVico(alpha=alpha).on_grid(grid)(q, k, v)
    assert relative(got.cpu(), ultravico(q.cpu(), k.cpu(), v.cpu(), 5, alpha)) < (1e-5 if device == "cpu" else 1e-2)
    assert torch.equal(before, k)


def test_ultravico_of_the_trained_length_without_decay_is_plain():
    q, k, v = (torch.randn(1, 21 * 4, 2, 16) for _ in range(3))
    assert relative(UltraVico(alpha=1.0).on_grid((21, 2, 2))(q, k, v), formula(q, k, v)) < 1e-5
    assert relative(UltraVico(alpha=0.3).on_grid((21, 2, 2))(q, k, v), formula(q, k, v)) > 1e-2


def test_without_a_grid_they_say_so():
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    for backend in (RadialAttention(), UltraVico()):
        with pytest.raises(ValueError, match=f"'{backend.name}' needs the token grid"):
            backend(q, k, v)
    with pytest.raises(ValueError, match="as many keys as queries"):
        RadialAttention().on_grid((2, 2, 2))(q, k[:, :4], v[:, :4])
