"""Triton kernels equal the eager PyTorch beside them, and eager PyTorch equals float64."""

import itertools

import interpreted
import pytest
import torch
from layouts import relative
from wanvideo_wrapper import kernels
from wanvideo_wrapper.kernels import fp8_rows, nvfp4
from wanvideo_wrapper.quantized.nvfp4 import quantize_nvfp4

ON_GPU = [pytest.mark.cuda, pytest.mark.sm89]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(1, 5120), (3, 13824), (257, 1536), (5, 40), (4, 1), (2, 8960)]


def same_rows(got, want):
    """Equal but for rounding at ties: scales to 1e-5, and hardly any value in the neighbouring FP8 step."""
    (values, scale), (want_values, want_scale) = got, want
    assert values.shape == want_values.shape and scale.shape == want_scale.shape
    # PyTorch's GELU of large negative numbers is a difference of nearly equal ones.
    assert torch.allclose(scale, want_scale, rtol=1e-5, atol=1e-9)
    a, b = values.float(), want_values.float()
    assert a.isfinite().all() and (a - b).abs().le(b.abs() / 8 + 2**-9).all()
    assert (a != b).float().mean() < 2e-3


def activation(shape, dtype):
    x = torch.randn(shape, device="cuda")
    x[..., :: max(shape[-1] // 4, 1)] *= 20
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 40, 64, 333])
def test_eager_keeps_each_rows_range(columns, dtype):
    x = torch.randn(7, columns).to(dtype) * torch.logspace(-4, 3, 7)[:, None].to(dtype)
    values, scale = fp8_rows.quantize_eager(x)
    wide = values.double() * scale.double()
    assert values.shape[-1] % 32 == 0 and not values[:, columns:].double().any()
    assert ((wide[:, :columns] - x.double()).abs() <= x.double().abs() / 16 + scale * 2**-10).all()


def weights(rows, columns, kind, device="cpu"):
    """FP8 values with all of their range, and scales far apart."""
    wide = torch.randn(rows, columns, device=device) * 2.0 ** torch.randint(-9, 7, (rows, columns), device=device)
    scale = torch.logspace(-5, 3, rows, device=device)[:, None] * (torch.rand(rows, 1, device=device) + 0.5)
    return wide.clamp(-448, 448).to(kind), scale


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_expanding_rounds_once(kind, dtype, device):
    for rows, columns in ((1, 5120), (16, 4096), (48, 32), (3, 2080)):
        values, scale = weights(rows, columns, kind, device)
        got = fp8_rows.expand_rows(values, scale, dtype)
        want = values.double() * scale.double()
        assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, want.float().to(dtype))


@pytest.mark.parametrize(
    ("device", "capability", "hip", "runs"),
    [
        ("cuda", (8, 9), None, True),
        ("cuda", (8, 6), None, False),
        ("cuda", (9, 4), "6.4", False),
        ("cpu", (9, 0), None, False),
    ],
)
def test_where_weights_are_expanded_by_the_kernel(device, capability, hip, runs, monkeypatch):
    """Triton reads FP8 on no older GPU, and AMD's have formats of their own."""
    monkeypatch.setattr(fp8_rows, "triton_runs", lambda device: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fp8_rows._has_expand_kernel(torch.device(device)) == runs


@interpreted.needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanding_interpreted(dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    triton = kernels.triton_kernels("fp8_rows_triton")
    monkeypatch.setattr(triton, "EXPANDED", 32)
    values, scale = weights(5, 80, torch.float8_e4m3fn)
    out = torch.full(values.shape, torch.nan, dtype=dtype)
    triton.expand_rows(values, scale, out)
    assert torch.equal(out, fp8_rows.expand_rows_eager(values, scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.cuda
@pytest.mark.sm89
def test_quantize(size, dtype):
    x = activation(size, dtype)
    same_rows(fp8_rows.quantize(x)[:2], fp8_rows.quantize_eager(x))
    scale = torch.tensor(0.03, device="cuda")
    same_rows(fp8_rows.quantize(x, scale)[:2], fp8_rows.quantize_eager(x, scale))
    # The scale of a row should not be that of a large negative number, where PyTorch's GELU is rounding alone.
    x[..., 0] = x[..., 0].abs() + 1
    same_rows(fp8_rows.gelu_quantize(x)[:2], fp8_rows.gelu_quantize_eager(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [256, 1536, 5120])
@pytest.mark.cuda
@pytest.mark.sm89
def test_norm(columns, dtype):
    x = activation((2, 5, columns), dtype)
    for shape in ((columns,), (2, 1, columns), (1, 1, columns), (2, 5, columns)):
        gain, shift = torch.rand(shape, device="cuda") + 0.5, torch.randn(shape, device="cuda")
        got = fp8_rows.norm_quantize(x, gain, shift, 1e-6)
        same_rows(got[:2], fp8_rows.norm_quantize_eager(x, gain, shift, 1e-6))
        wide = torch.nn.functional.layer_norm(x.double(), (columns,), eps=1e-6) * gain.double() + shift.double()
        assert relative(got.to(torch.float32), wide) < 0.04


@pytest.mark.parametrize("static", [None, 0.02])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_zero_and_bad_rows(device, static):
    x = torch.randn(4, 5120, device=device, dtype=torch.bfloat16)
    x[1] = 0
    x[2, 7] = float("nan")
    rows = fp8_rows.quantize(x, None if static is None else torch.tensor(static, device=device))
    assert not rows.values[1].float().any() and rows.scale.isfinite()[[0, 1, 3]].all()
    assert rows.to(torch.float32)[2, 7].isnan() and rows.to(torch.float32)[[0, 1, 3]].isfinite().all()


@pytest.mark.cuda
@pytest.mark.sm89
def test_more_than_two_to_the_31_values():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(5, 5120, device="cuda", dtype=torch.bfloat16)
    rows = fp8_rows.quantize(x.repeat(2**31 // 5120 // 5 + 7, 1))
    want = fp8_rows.quantize(x)
    assert torch.equal(rows.values[-5:].float(), want.values.float()) and torch.equal(rows.scale[-5:], want.scale)


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize(("rows", "columns"), list(itertools.product((16, 144, 5120), (32, 2080, 5120))))
def test_expand(rows, columns):
    weight = torch.randn(rows, columns)
    q = quantize_nvfp4(weight)
    factor = torch.exp2(torch.randint(-9, -2, (rows, 1)).float())
    want = nvfp4.expand_eager(q.codes, q.block_scale, factor)
    got = nvfp4.expand(q.codes.cuda(), q.block_scale.cuda(), factor.cuda()).cpu()
    assert torch.equal(got.view(torch.uint8) & 127, want.view(torch.uint8) & 127)
    assert torch.equal(got.float(), want.float())


def test_expand_is_exact_where_fp8_can_be():
    q = quantize_nvfp4(torch.randn(16, 32))
    ones = torch.full_like(q.block_scale.float(), 2.0).to(q.block_scale.dtype)
    got = nvfp4.expand_eager(q.codes, ones, torch.ones(16, 1)).float()
    assert torch.equal(got, nvfp4.codes_to_values(q.codes) * 2)


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need the package 'triton'.*without '_fast'"):
        kernels.triton_kernels("fp8_rows_triton")


@pytest.mark.parametrize("op", ["fp8_quantize", "fp8_gelu_quantize", "fp8_norm_quantize", "nvfp4_to_fp8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_operators_are_well_formed(op, device):
    x = torch.randn(2, 3, 40, device=device)
    q = quantize_nvfp4(torch.randn(32, 64))
    arguments = {
        "fp8_quantize": (x, None),
        "fp8_gelu_quantize": (x,),
        "fp8_norm_quantize": (x, torch.rand(40, device=device), torch.rand(2, 1, 40, device=device), 1e-6),
        "nvfp4_to_fp8": (q.codes.to(device), q.block_scale.to(device), torch.ones(32, 1, device=device)),
    }[op]
    operator = getattr(getattr(torch.ops, kernels.NAMESPACE), op).default
    # The schema test compares inputs by arithmetic, which FP8 tensors have none of.
    tests = ("test_faketensor",) if op == "nvfp4_to_fp8" else ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=tests)
