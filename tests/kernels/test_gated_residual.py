"""x + y * gate equals float64, for every type of activation and gates of every shape."""

import interpreted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, SETTINGS, bits, layouts, relative
from wanvideo_wrapper import kernels, tensor_layout
from wanvideo_wrapper.kernels.gated_residual import gated_residual
from wanvideo_wrapper.wanvideo.modules import layers

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def operands(batch, tokens, columns, dtype, device="cpu"):
    return [torch.randn(batch, tokens, columns, device=device).to(dtype) for _ in range(2)]


def gates(batch, tokens, columns, device="cpu"):
    shapes = ((), (columns,), (1, 1, columns), (batch, 1, columns), (batch, tokens, columns))
    return [torch.randn(shape, device=device) for shape in shapes]


def float64(x, y, gate):
    return x.double() + y.double() * gate.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [7, 1536, 5120])
def test_equals_float64(columns, dtype, device):
    x, y = operands(2, 5, columns, dtype, device)
    for gate in gates(2, 5, columns, device):
        got = gated_residual(x, y, gate)
        assert got.dtype == dtype and got.is_contiguous() and relative(got, float64(x, y, gate)) < TOLERANCES[dtype]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_takes_any_layout(device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)

    @SETTINGS
    @given(layouts(), layouts(), layouts(), st.sampled_from(DTYPES))
    def check(for_x, for_y, for_gate, dtype):
        x, y = (layout.build((2, 6, 96), dtype, device) for layout in (for_x, for_y))
        gate = for_gate.build((2, 1, 96), torch.float32, device)
        before = [bits(t) for t in (x, y, gate)]
        got = gated_residual(x, y, gate)
        assert relative(got, float64(x, y, gate)) < TOLERANCES[dtype]
        assert all(torch.equal(bits(t), old) for t, old in zip((x, y, gate), before, strict=True))

    check()


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 70000])
def test_the_models_residual_is_the_kernel_on_a_gpu(tokens, monkeypatch):
    x, y = operands(1, tokens, 96, torch.bfloat16, "cuda")
    gate = torch.randn(1, 1, 96, device="cuda")
    got = layers.gated_residual(x, y, gate)
    monkeypatch.setattr(layers, "_runs_fused", lambda x: False)
    assert relative(got, layers.gated_residual(x, y, gate)) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(device):
    x, y = operands(2, 3, 40, torch.bfloat16, device)
    operator = getattr(torch.ops, kernels.NAMESPACE).gated_residual.default
    for gate in gates(2, 3, 40, device):
        torch.library.opcheck(operator, (x, y, gate), test_utils=("test_schema", "test_faketensor"))


@interpreted.needed
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "tokens", "columns"), [(2, 5, 96), (1, 9, 33), (3, 1, 64)])
def test_kernel_interpreted(batch, tokens, columns, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("gated_residual_triton")
    monkeypatch.setattr(kernel, "PART", 32)
    x = torch.randn(batch, tokens + 1, 2 * columns).to(dtype)[:, 1:, columns:]
    (y, _) = operands(batch, tokens, columns, dtype)
    for gate in gates(batch, tokens, columns)[1:]:
        out = torch.full((batch, tokens, columns), float("nan"), dtype=dtype)
        kernel.gated_residual(x, y, gate, out)
        assert relative(out, float64(x, y, gate)) < TOLERANCES[dtype]
