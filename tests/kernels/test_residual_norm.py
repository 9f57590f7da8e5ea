"""A residual sum and the norm behind it in one pass equal the two kernels that they replace, and float64."""

import interpreted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, SETTINGS, bits, layouts, relative
from wanvideo_wrapper import kernels, tensor_layout
from wanvideo_wrapper.kernels.fp8_rows import norm_quantize, norm_quantize_eager
from wanvideo_wrapper.kernels.gated_residual import gated_residual
from wanvideo_wrapper.kernels.modulated_norm import norm_modulate, norm_modulate_eager
from wanvideo_wrapper.kernels.residual_norm import residual_norm, residual_norm_quantize

TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
GPUS = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]


def operands(batch, tokens, columns, dtype, device="cpu"):
    return [(torch.randn(batch, tokens, columns, device=device) * 2 + 0.5).to(dtype) for _ in range(2)]


def modulations(batch, tokens, columns, device="cpu"):
    """(gate, gain, shift) that all tokens share, that those of a video share, and of each token; without a gate, too"""
    for shape in ((columns,), (1, 1, columns), (batch, 1, columns), (batch, tokens, columns)):
        gate, gain, shift = (torch.randn(shape, device=device) for _ in range(3))
        yield gate, gain, shift
        yield None, gain, shift
    yield torch.randn(batch, 1, columns, device=device), *torch.randn(2, columns, device=device)
    yield torch.randn(1, tokens, columns, device=device), *torch.randn(2, columns, device=device)
    yield torch.randn((), device=device), *torch.randn(2, columns, device=device)


def float64(x, y, gate, gain, shift):
    total = x.double() + y.double() * (1 if gate is None else gate.double())
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], eps=1e-6) * gain.double() + shift.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [7, 1536, 5120])
def test_equals_float64(columns, dtype, device):
    x, y = operands(2, 5, columns, dtype, device)
    for modulation in modulations(2, 5, columns, device):
        got, want = residual_norm(x, y, *modulation, 1e-6), float64(x, y, *modulation)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == dtype and mine.is_contiguous() and relative(mine, theirs) < TOLERANCES[dtype]


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("columns", [7, 1536, 5120])
def test_equals_the_two_kernels_to_the_bit(columns, device):
    x, y = operands(2, 5, columns, torch.bfloat16, device)
    for gate, gain, shift in modulations(2, 5, columns, device):
        total = x + y if gate is None else gated_residual(x, y, gate)
        got, normed = residual_norm(x, y, gate, gain, shift, 1e-6)
        assert torch.equal(got, total) and torch.equal(normed, norm_modulate(total, gain, shift, 1e-6))
        got, rows = residual_norm_quantize(x, y, gate, gain, shift, 1e-6)
        want = norm_quantize(total, gain, shift, 1e-6)
        assert torch.equal(got, total) and torch.equal(rows.scale, want.scale)
        assert torch.equal(bits(rows.values), bits(want.values)) and rows[2:] == want[2:]


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("tokens", [8192, 8201])
def test_many_tokens_share_a_modulation(tokens):
    x, y = operands(2, tokens, 256, torch.bfloat16, "cuda")
    modulation = torch.randn(3, 2, 1, 256, device="cuda")
    want = float64(x, y, *modulation)
    for got, theirs in zip(residual_norm(x, y, *modulation, 1e-6), want, strict=True):
        assert relative(got, theirs) < 4e-3
    got, rows = residual_norm_quantize(x, y, *modulation, 1e-6)
    assert relative(got, want[0]) < 4e-3 and relative(rows.to(torch.float32), want[1]) < 0.04


@torch.no_grad()
@pytest.mark.parametrize("device", GPUS)
def test_takes_any_layout(device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)

    @SETTINGS
    @given(layouts(), layouts(), layouts(), layouts(), st.sampled_from(DTYPES))
    def check(for_x, for_y, for_gate, for_gain, dtype):
        x, y = (layout.build((2, 6, 96), dtype, device) for layout in (for_x, for_y))
        gate, gain = (layout.build((2, 1, 96), torch.float32, device) for layout in (for_gate, for_gain))
        before = [bits(t) for t in (x, y, gate, gain)]
        want = float64(x, y, gate, gain, gain)
        for got, theirs in zip(residual_norm(x, y, gate, gain, gain, 1e-6), want, strict=True):
            assert relative(got, theirs) < 2 * TOLERANCES[dtype]
        rows = residual_norm_quantize(x, y, gate, gain, gain, 1e-6)[1]
        assert relative(rows.to(torch.float32), want[1]) < 0.05
        assert all(torch.equal(bits(t), old) for t, old in zip((x, y, gate, gain), before, strict=True))

    check()


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("name", ["residual_norm", "residual_norm_quantize"])
def test_operators_are_well_formed(name, device):
    x, y = operands(2, 3, 40, torch.bfloat16, device)
    operator = getattr(getattr(torch.ops, kernels.NAMESPACE), name).default
    for modulation in modulations(2, 3, 40, device):
        torch.library.opcheck(operator, (x, y, *modulation, 1e-6), test_utils=("test_schema", "test_faketensor"))


@interpreted.needed
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "tokens", "columns"), [(2, 5, 96), (1, 9, 33), (3, 1, 64)])
def test_kernel_interpreted(batch, tokens, columns, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("residual_norm_triton")
    for name, value in (("MANY_TOKENS", 3), ("SHARED_ROWS", 4), ("WARP_COLUMNS", 32)):
        monkeypatch.setattr(kernel, name, value)
    x, y = operands(batch, tokens, columns, dtype)
    for gate, gain, shift in modulations(batch, tokens, columns):
        want, _ = float64(x, y, gate, gain, shift)
        # The operator expands it.
        gate = gate.expand(columns).contiguous() if gate is not None and gate.dim() == 0 else gate
        total = torch.full((batch, tokens, columns), float("nan"), dtype=dtype)
        normed = torch.full_like(total, float("nan"))
        kernel.residual_norm((x, y, gate), (gain, shift), (total, normed, None), eps=1e-6)
        assert relative(total, want) < TOLERANCES[dtype]
        assert relative(normed, norm_modulate_eager(total, gain, shift, 1e-6)) < TOLERANCES[dtype]
        values, scale = norm_quantize_eager(total, gain, shift, 1e-6)
        got, got_scale = torch.empty_like(values), torch.full_like(scale, float("nan"))
        total.fill_(float("nan"))
        kernel.residual_norm((x, y, gate), (gain, shift), (total, got, got_scale), eps=1e-6)
        assert relative(total, want) < TOLERANCES[dtype] and torch.allclose(got_scale, scale, rtol=1e-5, atol=0)
        assert relative(got.float() * got_scale, values.float() * scale) < 3e-3
