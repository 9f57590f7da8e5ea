"""Queries, keys and values in FP8: eager PyTorch equals float64, and the Triton kernels equal eager PyTorch."""

import importlib

import interpreted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, SETTINGS, bits, fresh, layouts, relative
from scipy.linalg import hadamard
from wanvideo_wrapper import kernels, tensor_layout
from wanvideo_wrapper.kernels import norm_rope_fp8 as ops
from wanvideo_wrapper.wanvideo.rope import rope_table

ON_GPU = [pytest.mark.cuda, pytest.mark.sm89]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
EPS = 1e-6
# Heads, head size, token grid, batch.
SIZES = [(40, 128, (2, 3, 4), 1), (12, 128, (3, 2, 2), 2), (24, 128, (1, 1, 1), 1), (3, 64, (2, 3, 5), 2),
         (1, 64, (1, 2, 2), 1), (5, 128, (1, 1, 7), 1), (33, 64, (1, 2, 3), 1)]  # fmt: skip


def inputs(heads, size, grid, batch, *, dtype=torch.bfloat16, device="cpu", riflex=0):
    """x [B, L, C] with outlier channels, weight [C], rope [L, D/2, 2]."""
    rope = rope_table(grid, size, riflex_index=riflex)
    x = torch.randn(batch, rope.shape[0], heads * size) * torch.rand(batch, rope.shape[0], 1) * 5
    x[..., :: max(size // 3, 1)] *= 8
    weight = torch.rand(heads * size) * 2 + 0.1
    return x.to(device, dtype), weight.to(device, dtype), rope.to(device)


def placed(x, weight, rope, heads):
    """Norm and rotary position in float64, by complex numbers: [B, L, H, D]."""
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return turned(normed.unflatten(-1, (heads, -1)), rope)


def turned(x, rope):
    """Rotary position in float64, by complex numbers: x [B, L, H, D]."""
    turn = torch.view_as_complex(rope.double().contiguous()).unsqueeze(-2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotation(size):
    """The orthonormal Hadamard matrix, float64."""
    return torch.from_numpy(hadamard(size)).double() / size**0.5


def taken(tokens):
    """The sampled tokens, counted one by one."""
    return [i * tokens // min(ops.SAMPLE, tokens) for i in range(min(ops.SAMPLE, tokens))]


def assert_rounded(values, scale, want):
    """E4M3 of `want`: half a step (1/16 of the value, or of the least normal one), and the float16 inside."""
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (1,) and scale.dtype == torch.float32
    got, scale = values.double().cpu() * scale.double().cpu(), scale.double().cpu()
    want = want.cpu()
    typical = want.square().mean(-1, keepdim=True).sqrt()
    assert ((got - want).abs() <= want.abs() / 16 + scale * 2**-10 + typical * 2**-8).all()
    assert relative(got, want) < 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("riflex", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(sizes, dtype, riflex, device):
    heads, size = sizes[:2]
    x, weight, rope = inputs(*sizes, dtype=dtype, device=device, riflex=riflex)
    want = placed(x.cpu(), weight.cpu(), rope.cpu(), heads)
    only = ops.rope_heads(x.unflatten(-1, (heads, size)), rope)
    want_only = turned(x.cpu().unflatten(-1, (heads, size)), rope.cpu())
    assert only.dtype == dtype and relative(only.cpu(), want_only) < 2 * torch.finfo(dtype).eps
    plain = ops.norm_rope(x, weight, rope, EPS, heads)
    assert plain.dtype == dtype and relative(plain.cpu(), want) < 2 * torch.finfo(dtype).eps
    mean = ops.norm_rope_mean(x, weight, rope, EPS, heads)
    assert torch.allclose(mean.cpu().double(), want[:, taken(x.shape[1])].mean(1).flatten(1), atol=2e-5, rtol=1e-4)
    assert_rounded(*ops.norm_rope_fp8(x, weight, rope, None, EPS, heads), want @ rotation(size))
    shift = torch.randn(x.shape[0], heads * size, device=device)
    shifted = want - shift.cpu().double().view(-1, 1, heads, size)
    assert_rounded(*ops.norm_rope_fp8(x, weight, rope, shift, EPS, heads), shifted @ rotation(size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_heads_and_values(sizes, dtype, device):
    heads, size = sizes[:2]
    x = inputs(*sizes, dtype=dtype, device=device)[0].unflatten(-1, (heads, size))
    # No larger than x, as a mean of its tokens is: the scale allows for that.
    shift = (torch.rand(x.shape[0], heads * size, device=device) * 2 - 1) * x.float().abs().amax()
    wide = x.cpu().double()
    assert_rounded(*ops.rotate_fp8(x, None), wide @ rotation(size))
    assert_rounded(*ops.rotate_fp8(x, shift), (wide - shift.cpu().double().view(-1, 1, heads, size)) @ rotation(size))
    values, scale = ops.tensor_fp8(x)
    assert_rounded(values, scale, wide)
    assert (values.float().abs().amax() / 448).item() + 0.01 > 0.5 and scale.log2().frac().item() == 0
    expanded = ops.expand_fp8(values, scale, dtype)
    assert expanded.dtype == dtype and torch.equal(expanded.float(), (values.float() * scale).to(dtype).float())


@pytest.mark.parametrize("device", DEVICES)
def test_positions_of_a_batch_may_differ(device):
    x, weight, rope = inputs(3, 64, (2, 3, 5), 2, device=device)
    ropes = torch.stack((rope, rope.roll(7, 0)))
    got = ops.norm_rope_fp8(x, weight, ropes, None, EPS, 3)
    assert_rounded(*got, placed(x.cpu(), weight.cpu(), ropes.cpu(), 3) @ rotation(64))
    only = ops.rope_heads(x.unflatten(-1, (3, 64)), ropes)
    assert relative(only.cpu(), turned(x.cpu().unflatten(-1, (3, 64)), ropes.cpu())) < 2 * torch.finfo(x.dtype).eps
    assert ops.norm_rope_mean(x, weight, ropes, EPS, 3)[1].equal(ops.norm_rope_mean(x, weight, ropes[1], EPS, 3)[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [64, 128])
def test_the_worst_head_does_not_saturate(size, device):
    # All of a row in one head, and all of that head in one channel once it is rotated: the bound itself.
    heads, row = 40, 37
    x = torch.zeros(1, 2, heads * size)
    x[:, :, :size] = torch.from_numpy(hadamard(size))[row] * 3.0
    weight, rope = torch.full((heads * size,), 1.7), torch.zeros(2, size // 2, 2)
    rope[..., 0] = 1
    x, weight, rope = x.to(device), weight.to(device), rope.to(device)
    length = 1.7 * (heads * size) ** 0.5
    for shift in (None, -length * torch.from_numpy(hadamard(size))[row].float() / size**0.5):
        if shift is not None:
            shift = torch.cat((shift, torch.zeros(heads * size - size))).view(1, -1).to(device)
        values, scale = ops.norm_rope_fp8(x, weight, rope, shift, EPS, heads)
        got = (values.float() * scale)[0, 0, 0, row].item()
        want = length if shift is None else 2 * length
        assert abs(got / want - 1) < 1 / 16 and 224 <= values.float().abs().amax().item() <= 448


@pytest.mark.parametrize("device", DEVICES)
def test_room_behind_the_tokens_holds_zeros(device):
    x, weight, rope = inputs(3, 64, (1, 2, 3), 2, device=device)
    shift, heads = torch.randn(2, 192, device=device), x.unflatten(-1, (3, 64))
    calls = {
        ops.norm_rope_fp8: (x, weight, rope, shift, EPS, 3), ops.rotate_fp8: (heads, shift), ops.tensor_fp8: (heads,)
    }  # fmt: skip
    for operator, arguments in calls.items():
        (plain, scale), (roomy, same_scale) = operator(*arguments), operator(*arguments, 11)
        assert roomy.shape == (2, 11, 3, 64) and roomy.is_contiguous() and torch.equal(scale, same_scale)
        assert torch.equal(bits(roomy[:, :6]), bits(plain)) and not bits(roomy[:, 6:]).any() and bits(plain).any()


def test_sampled_tokens_do_not_follow_the_grid():
    for frames, height, width in ((21, 30, 52), (21, 48, 48), (21, 45, 80)):
        index = ops.sampled(frames * height * width, torch.device("cpu"))
        assert len(index) == len(index.unique()) == ops.SAMPLE and index[-1] >= frames * height * width * 0.99
        assert len((index % width).unique()) > width // 2 and len((index // width % height).unique()) > height // 2


def test_scale_is_the_least_power_of_two():
    bound = (torch.rand(2000) + 0.1) * 10.0 ** torch.randint(-8, 8, (2000,))
    scale = ops.power_of_two(bound)
    assert (scale.log2().frac() == 0).all() and (bound / scale <= 448).all() and (bound / scale >= 224).all()
    assert ops.power_of_two(torch.tensor([448.0, 449.0, 0.0])).tolist()[:2] == [1.0, 2.0]
    assert ops.power_of_two(torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_stay_zeros_and_nan_is_not_hidden(device):
    x, weight, rope = inputs(3, 64, (2, 3, 5), 1, device=device)
    x[:, 1] = 0
    x[:, 2, 7] = float("nan")
    for values, _ in (
        ops.norm_rope_fp8(x, weight, rope, None, EPS, 3),
        ops.rotate_fp8(x.unflatten(-1, (3, 64))[:, :2], None),
        ops.tensor_fp8(x[:, :2]),
    ):
        assert not values[:, 1].float().any() and values[:, 0].float().isfinite().all()
    values, _ = ops.norm_rope_fp8(x, weight, rope, None, EPS, 3)
    assert values[:, 2].float().isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 48])
def test_norm_and_position_of_other_head_sizes(size, device):
    x, weight, rope = inputs(2, size, (2, 2, 3), 1, device=device)
    want = placed(x.cpu(), weight.cpu(), rope.cpu(), 2)
    assert relative(ops.norm_rope(x, weight, rope, EPS, 2).cpu(), want) < 2 * torch.finfo(x.dtype).eps


def test_other_head_sizes_are_refused():
    with pytest.raises(ValueError, match="64 or 128 channels, not 32"):
        ops.rotate_fp8(torch.randn(1, 2, 3, 32), None)
    with pytest.raises(ValueError, match="64 or 128 channels, not 96"):
        ops.norm_rope_fp8(torch.randn(1, 2, 192), torch.ones(192), torch.ones(2, 48, 2), None, EPS, 2)


def same(got, want):
    """Equal but for ties, one step of E4M3 apart: a few values in a thousand, or one of a small tensor.

    Near zero more steps: the rotation's sums are float16, up to 16 on the way, where their last bit is 2 ** -7.
    """
    assert torch.allclose(got[1], want[1], rtol=1e-6, atol=0)
    a, b = got[0].float(), want[0].float()
    assert (a != b).sum() <= max(3e-3 * a.numel(), 1)
    assert ((a - b).abs() <= torch.maximum(a.abs(), b.abs()) / 8 + 2**-6).all()


def empty(x, heads, more=0):
    """Room for the values, with `more` zeros behind each video, and the scale."""
    size = x.shape[-1] // heads
    shape = (x.shape[0], x.shape[1] + more, heads, size)
    return torch.zeros(shape, device=x.device).to(torch.float8_e4m3fn), torch.empty(1, device=x.device)


def filled_up(want, more):
    values = torch.nn.functional.pad(want[0].float(), (0, 0, 0, 0, 0, more)).to(want[0].dtype)
    return values, want[1]


def compare_kernels(triton, sizes, dtype, device):
    heads, size = sizes[:2]
    x, weight, rope = inputs(*sizes, dtype=dtype, device=device)
    # The second half of a wider projection: strides that are not the shape's.
    x = torch.cat((x, x.flip(-1)), dim=-1)[..., x.shape[-1] :]
    mean = ops.mean_eager(x, weight, rope, EPS, heads)
    ropes = torch.stack([rope.roll(3 * i, 0) for i in range(x.shape[0])])
    for turns in (rope, ropes):
        out = torch.full((*x.shape[:2], heads, size), float("nan"), dtype=dtype, device=device)
        triton.rope_heads(x, turns, out)
        assert (
            relative(out.cpu(), turned(x.cpu().unflatten(-1, (heads, size)), turns.cpu())) < 2 * torch.finfo(dtype).eps
        )
    for count in (x.shape[1], max(x.shape[1] // 2, 1)):
        for kind in (torch.float32, dtype):
            out = torch.empty(x.shape[0], count, heads, size, dtype=kind, device=device)
            triton.norm_rope(x, weight, rope, out, eps=EPS)
            index = torch.arange(count, device=device) * x.shape[1] // count
            want = ops.norm_rope_eager(x, weight, rope, EPS, heads)[:, index].to(kind)
            assert relative(out.float(), want.float()) < (1e-6 if kind == torch.float32 else 1e-3)
    for shift, more in ((None, 0), (mean, 0), (mean, 3)):
        got = empty(x, heads, more)
        triton.norm_rope_fp8(x, weight, rope, shift, *got, eps=EPS)
        same(got, filled_up(ops.norm_rope_fp8_eager(x, weight, rope, shift, EPS, heads), more))
        got = empty(x, heads, more)
        triton.rotate_fp8(x, x.float().abs().amax().view(1), shift, *got)
        same(got, filled_up(ops.rotate_fp8_eager(x.unflatten(-1, (heads, size)), shift), more))
    values = x.contiguous().unflatten(-1, (heads, size))
    got = empty(x, heads, 2)
    triton.tensor_fp8(values, values.float().abs().amax().view(1), *got)
    same(got, filled_up(ops.tensor_fp8_eager(values), 2))
    got = empty(x, heads)
    triton.tensor_fp8(values, values.float().abs().amax().view(1), *got)
    same(got, ops.tensor_fp8_eager(values))
    out = torch.empty(values.shape, dtype=dtype, device=device)
    triton.expand_fp8(*got, out)
    assert torch.equal(out, (got[0].float() * got[1]).to(dtype))


@interpreted.needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_interpreted(sizes, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    triton = importlib.import_module("wanvideo_wrapper.kernels.norm_rope_fp8_triton")
    compare_kernels(triton, sizes, dtype, "cpu")


@interpreted.needed
def test_scale_interpreted(monkeypatch):
    interpreted.exact(monkeypatch)
    triton = importlib.import_module("wanvideo_wrapper.kernels.norm_rope_fp8_triton")
    edges = (torch.tensor([1.0, 1.75, 1.9]) * 2.0 ** torch.tensor([[-40], [-3], [8], [90]])).view(-1, 1)
    for largest in (edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.0))):
        for bound in (*largest, torch.zeros(1)):
            values, scale = empty(bound.view(1, 1, 1), 1)
            triton.tensor_fp8(bound, bound, values, scale)
            assert scale.equal(ops.power_of_two(bound))


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [*SIZES, (40, 128, (5, 30, 52), 1)], ids=str)
def test_kernels(sizes, dtype):
    triton = importlib.import_module("wanvideo_wrapper.kernels.norm_rope_fp8_triton")
    compare_kernels(triton, sizes, dtype, "cuda")


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "entry", ["norm_rope", "rope_heads", "norm_rope_mean", "norm_rope_fp8", "rotate_fp8", "tensor_fp8", "expand_fp8"]
)
def test_any_layout(entry, device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    heads, size = 3, 64
    weight, rope = torch.rand(heads * size, device=device), rope_table((1, 2, 3), size).to(device)

    def run(x, place):
        shift = place(torch.linspace(-1, 1, x.shape[0] * heads * size, device=device).view(x.shape[0], -1))
        gain, turns = place(weight.to(x.dtype)), place(rope)
        return {
            "norm_rope": lambda: ops.norm_rope(x, gain, turns, EPS, heads),
            "rope_heads": lambda: ops.rope_heads(x.unflatten(-1, (heads, size)), turns),
            "norm_rope_mean": lambda: ops.norm_rope_mean(x, gain, turns, EPS, heads),
            "norm_rope_fp8": lambda: ops.norm_rope_fp8(x, gain, turns, shift, EPS, heads)[0].float(),
            "rotate_fp8": lambda: ops.rotate_fp8(x.unflatten(-1, (heads, size)), shift)[0].float(),
            "tensor_fp8": lambda: ops.tensor_fp8(x.unflatten(-1, (heads, size)))[0].float(),
            "expand_fp8": lambda: ops.expand_fp8(
                place(x.clamp(-9, 9).to(torch.float8_e4m3fn)), torch.full((1,), 2.0, device=device), x.dtype
            ),
        }[entry]()

    @SETTINGS
    @given(layouts(), layouts().filter(lambda layout: layout.kind != "expanded"), st.sampled_from(DTYPES))
    def check(layout, other, dtype):
        x = layout.build((2, 6, heads * size), dtype, device)
        before = bits(x)
        got, want = run(x, other.place), run(fresh(x), fresh)
        assert torch.equal(bits(x), before)
        # Sums in another order may fall on the other side of a tie.
        assert got.isfinite().all() and relative(got, want) < 5e-3

    check()


@SETTINGS
@given(layouts(), layouts().filter(lambda layout: layout.kind != "expanded"), st.sampled_from(DTYPES))
def test_what_reaches_the_kernels_passes_the_layout_check(layout, other, dtype):
    x, weight, rope = layout.build((2, 6, 192), dtype), torch.rand(192).to(dtype), rope_table((1, 2, 3), 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_layout, "CHECKING", True)
        ready = ops._ready("norm_rope", x, other.place(weight), other.place(rope))
    assert all(torch.equal(got, want) for got, want in zip(ready, (x, weight, rope), strict=True))
    assert ready[2].is_contiguous() and all(t.data_ptr() % 16 == 0 for t in ready)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_well_formed(device):
    x, weight, rope = inputs(3, 64, (1, 2, 3), 2, device=device)
    heads, shift = x.unflatten(-1, (3, 64)), torch.randn(2, 192, device=device)
    values, scale = ops.tensor_fp8(heads)
    calls = {
        "norm_rope": (x, weight, rope, EPS, 3),
        "rope_heads": (heads, rope),
        "norm_rope_mean": (x, weight, rope, EPS, 3),
        "norm_rope_fp8": (x, weight, rope, shift, EPS, 3, 8),
        "rotate_fp8": (heads, None, 8),
        "tensor_fp8": (heads, 8),
        "expand_fp8": (values, scale, torch.bfloat16),
    }
    for name, arguments in calls.items():
        operator = getattr(getattr(torch.ops, kernels.NAMESPACE), name).default
        # The schema test compares inputs by arithmetic, which FP8 tensors have none of.
        tests = ("test_faketensor",) if name == "expand_fp8" else ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=tests)
