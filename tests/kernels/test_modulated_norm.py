"""The fused norms equal float64 for every type of activation, with float32 modulation of every shape."""

import types

import interpreted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, SETTINGS, bits, layouts, relative
from wanvideo_wrapper import kernels, tensor_layout
from wanvideo_wrapper.kernels.fp8_rows import gelu_quantize_eager, norm_quantize, norm_quantize_eager, quantize_eager
from wanvideo_wrapper.kernels.modulated_norm import norm_modulate, norm_modulate_eager, rms_norm
from wanvideo_wrapper.wanvideo.modules import layers
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [7, 128, 1536, 5120])
def test_equals_float64(columns, dtype, device):
    x = (torch.randn(2, 5, columns, device=device) * 3 + 1).to(dtype)
    for shape in ((columns,), (1, 1, columns), (2, 1, columns), (2, 5, columns)):
        gain, shift = torch.rand(shape, device=device) + 0.5, torch.randn(shape, device=device)
        got = norm_modulate(x, gain, shift, 1e-6)
        want = torch.nn.functional.layer_norm(x.double(), (columns,), eps=1e-6) * gain.double() + shift.double()
        assert got.dtype == dtype and relative(got, want) < TOLERANCES[dtype]


def rms_float64(x, weight):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [7, 1536, 5120])
def test_rms_norm_equals_float64(columns, dtype, device):
    x = (torch.randn(2, 5, columns, device=device) * 3 + 1).to(dtype)
    for kind in (dtype, torch.float32):
        weight = (torch.rand(columns, device=device) + 0.5).to(kind)
        got = rms_norm(x, weight, 1e-6)
        assert got.dtype == dtype and relative(got, rms_float64(x, weight)) < TOLERANCES[dtype]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_takes_any_layout(device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)

    @SETTINGS
    @given(layouts(), layouts().filter(lambda layout: layout.kind != "expanded"), st.sampled_from(DTYPES))
    def check(layout, other, dtype):
        x, weight = layout.build((2, 6, 96), dtype, device), torch.rand(96, device=device) + 0.5
        before = bits(x)
        got = rms_norm(x, other.place(weight.to(dtype)), 1e-6)
        assert torch.equal(bits(x), before) and relative(got, rms_float64(x, weight.to(dtype))) < TOLERANCES[dtype]

    check()


@torch.no_grad()
@pytest.mark.cuda
def test_the_models_rms_norm_is_the_kernel_on_a_gpu(monkeypatch):
    norm, x = WanRMSNorm(5120, 1e-6).cuda(), torch.randn(1, 9, 5120, device="cuda").bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    got = norm(x)
    monkeypatch.setattr(layers, "_runs_fused", lambda x: False)
    assert relative(got, norm(x)) < 1e-3


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("tokens", [8192, 8201])
def test_many_tokens_share_a_modulation(tokens):
    x = torch.randn(2, tokens, 256, device="cuda").bfloat16()
    gain, shift = torch.rand(2, 1, 256, device="cuda") + 0.5, torch.randn(2, 1, 256, device="cuda")
    want = torch.nn.functional.layer_norm(x.double(), (256,), eps=1e-6) * gain.double() + shift.double()
    assert relative(norm_modulate(x, gain, shift, 1e-6), want) < 3e-3
    assert relative(norm_quantize(x, gain, shift, 1e-6).to(torch.float32), want) < 0.04


@pytest.mark.parametrize("device", DEVICES)
def test_takes_slices_and_leaves_its_inputs(device):
    packed = torch.randn(2, 6, 3 * 40 + 1, device=device).bfloat16()
    x, gain = packed[:, 1:, 41:81], torch.randn(2, 6, 80, device=device)[:, :1, 1:41]
    before = packed.clone()
    got = norm_modulate(x, gain, gain, 1e-6)
    want = torch.nn.functional.layer_norm(x.double(), (40,), eps=1e-6) * gain.double() + gain.double()
    assert relative(got, want) < 3e-3 and torch.equal(packed, before)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(device):
    x = torch.randn(2, 3, 40, device=device).bfloat16()
    arguments = (x, torch.rand(40, device=device), torch.rand(2, 1, 40, device=device), 1e-6)
    operator = getattr(torch.ops, kernels.NAMESPACE).norm_modulate.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    operator = getattr(torch.ops, kernels.NAMESPACE).rms_norm.default
    torch.library.opcheck(operator, (x, arguments[1], 1e-6), test_utils=("test_schema", "test_faketensor"))


@interpreted.needed
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "tokens", "columns"), [(2, 5, 96), (1, 9, 33), (3, 1, 64)])
def test_kernel_interpreted(batch, tokens, columns, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("fp8_rows_triton")
    monkeypatch.setattr(kernel, "MANY_TOKENS", 3)
    monkeypatch.setattr(kernel, "SHARED_ROWS", 4)
    x = (torch.randn(batch, tokens + 1, 2 * columns) * 3 + 1).to(dtype)[:, 1:, columns:]
    for shape in ((columns,), (1, 1, columns), (batch, 1, columns), (batch, tokens, columns)):
        gain, shift = torch.rand(shape) + 0.5, torch.randn(shape)
        out = torch.full((batch, tokens, columns), float("nan"), dtype=dtype)
        kernel.norm_modulate(x, gain, shift, out, eps=1e-6)
        assert relative(out, norm_modulate_eager(x, gain, shift, 1e-6)) < TOLERANCES[dtype]
        if gain.dim() == 1:
            weight = gain.to(dtype)
            out.fill_(float("nan"))
            kernel.rms_norm(x, weight, out, eps=1e-6)
            assert relative(out, rms_float64(x, weight)) < TOLERANCES[dtype]
        want, want_scale = norm_quantize_eager(x, gain, shift, 1e-6)
        values, scale = torch.empty_like(want), torch.full_like(want_scale, float("nan"))
        kernel.norm_quantize(x, gain, shift, values, scale, eps=1e-6)
        assert torch.allclose(scale, want_scale, rtol=1e-5, atol=0)
        assert relative(values.float() * scale, want.float() * want_scale) < 3e-3


@interpreted.needed
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("columns", [1, 33, 96])
def test_quantize_interpreted(columns, gelu, monkeypatch):
    interpreted.exact(monkeypatch)
    x = (torch.randn(5, columns) * 3).bfloat16()
    values, scale = (gelu_quantize_eager if gelu else quantize_eager)(x)
    got = torch.full(values.shape, float("nan")).to(values.dtype)
    got_scale = torch.full_like(scale, float("nan"))
    kernels.triton_kernels("fp8_rows_triton").quantize(x, None, got, got_scale, gelu=gelu)
    assert torch.allclose(got_scale, scale, rtol=1e-5, atol=1e-9) and not got[:, columns:].float().any()
    assert relative(got.float() * got_scale, values.float() * scale) < 3e-3


def test_without_a_compiler_triton_does_not_run(monkeypatch, caplog):
    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nMore advice")

    trial = types.SimpleNamespace(run=no_compiler)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "triton_kernels", lambda name: trial)
    monkeypatch.setattr(kernels, "_runs", {})
    for _ in range(2):
        assert not kernels.triton_runs(torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "Triton does not run here (RuntimeError: Failed to find C compiler.): norm and position take several passes in "
        "PyTorch, which is slower."
    ]


@pytest.mark.cuda
def test_triton_runs_on_a_gpu():
    assert kernels.triton_runs(torch.device("cuda", torch.cuda.current_device()))


@interpreted.needed
def test_quantize_with_a_scale_of_the_file_interpreted(monkeypatch):
    interpreted.exact(monkeypatch)
    x = torch.randn(4, 33)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -1e6
    values, scale = quantize_eager(x, torch.tensor(0.02))
    got = torch.zeros_like(values)
    got_scale = torch.full_like(scale, float("nan"))
    kernels.triton_kernels("fp8_rows_triton").quantize(x, torch.tensor(0.02), got, got_scale, gelu=False)
    assert torch.equal(got_scale, scale) and got.float()[0].isnan().nonzero().tolist() == [[3]]
    assert torch.equal(got.float().nan_to_num(), values.float().nan_to_num())


def test_a_full_gpu_says_nothing_of_triton(monkeypatch, caplog):
    said = ["CUDA out of memory. Tried to allocate 2.00 MiB", "Triton Error [CUDA]: out of memory", "no compiler"]

    def run(device):
        raise RuntimeError(said.pop(0))

    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "triton_kernels", lambda name: types.SimpleNamespace(run=run))
    monkeypatch.setattr(kernels, "_runs", {})
    assert [kernels.triton_runs(torch.device("cpu")) for _ in range(4)] == [True, True, False, False]
    assert len(caplog.records) == 1
