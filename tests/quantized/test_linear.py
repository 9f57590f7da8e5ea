"""Every quantized linear layer computes its formula, for all shapes and dtypes, and changes nothing it is given."""

import re

import comfy_kitchen
import pytest
import torch
from layouts import bits, relative
from torch import nn
from wanvideo_wrapper import kernels
from wanvideo_wrapper.fp8_optimization import KEEP, convert_fp8_linear, fp8_linear_forward, keeps_precision
from wanvideo_wrapper.kernels.fp8_rows import gelu_quantize, norm_quantize, quantize
from wanvideo_wrapper.quantized import fp8
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear, quantize_rows, runs_fp8
from wanvideo_wrapper.quantized.linear import is_plain, shared_input, weight_of
from wanvideo_wrapper.quantized.nvfp4 import (
    Nvfp4,
    Nvfp4Fp8Linear,
    Nvfp4Linear,
    Nvfp4MatmulLinear,
    quantize_nvfp4,
    runs_fp4,
    values_of,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Kind -> layer of weight and bias, and how far its result may be from float64's with the weight it stores.
KINDS = {
    "e4m3": (lambda w, b: Fp8Linear.quantize(w, b, E4M3), 5e-3),
    "e5m2": (lambda w, b: Fp8Linear.quantize(w, b, E5M2), 5e-3),
    "e4m3 fast": (lambda w, b: Fp8MatmulLinear.quantize(w, b, E4M3), 0.06),
    "e5m2 fast": (lambda w, b: Fp8MatmulLinear.quantize(w, b, E5M2), 0.06),
    "nvfp4": (Nvfp4Linear.quantize, 1e-2),
    "nvfp4 by fp8": (Nvfp4Fp8Linear.quantize, 0.07),
    "nvfp4 fast": (Nvfp4MatmulLinear.quantize, 0.2),
}
SIZES = [(48, 64), (50, 70), (33, 47), (5, 3), (160, 2080)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "columns"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind, features, columns, dtype):
    make, tolerance = KINDS[kind]
    # A sum of few products averages no rounding out: each operand may be off by half an FP8 step, 1/16.
    tolerance = tolerance if columns > 40 else max(3 * tolerance, 0.14)
    weight, bias = torch.randn(features, columns) * 0.1, torch.randn(features).to(dtype)
    for given in (bias, None):
        layer = make(weight, given)
        stored = layer.expanded(torch.float64)
        assert stored.shape == weight.shape and 0 < relative(stored, weight) < 0.2
        for lead in ((), (1,), (7,), (2, 3), (2, 3, 4)):
            x = torch.randn(*lead, columns).to(dtype)
            before = bits(x)
            got = layer(x)
            want = x.double() @ stored.t() + (0 if given is None else given.double())
            assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
            assert relative(got, want) < tolerance
            assert torch.equal(bits(x), before)
        assert layer(torch.randn(0, columns).to(dtype)).shape == (0, features)


@pytest.mark.parametrize("columns", [40, 63, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_another_width_is_refused(kind, columns):
    # The stored weight is padded to 64, so that the product itself would take all but the last.
    layer = KINDS[kind][0](torch.randn(33, 50), None)
    with pytest.raises(ValueError, match=f"reads 50 channels, but its input has {columns}"):
        layer(torch.randn(2, columns))
    if layer.takes_rows:
        with pytest.raises(ValueError, match="reads 50 channels"):
            layer(quantize(torch.randn(2, columns)))


@pytest.mark.parametrize("bias", [None, torch.randn(50)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])])
def test_e5m2_where_no_product_scales_its_rows(device, bias, monkeypatch):
    weight = torch.randn(50, 70) * torch.logspace(-3, 3, 50)[:, None]
    layer = Fp8MatmulLinear.quantize(weight, bias, E5M2).to(device)
    x = (torch.randn(9, 70) * torch.logspace(-3, 3, 9)[:, None]).to(device, torch.bfloat16)
    want = layer(x)
    monkeypatch.setattr(fp8, "_scales_rows", lambda weight: False)
    size = x.float().abs() @ layer.expanded(torch.float32).abs().t() + (0 if bias is None else layer.bias.abs())
    # The two differ by four roundings to bfloat16.
    assert ((layer(x) - want).float().abs() <= size / 64).all() and relative(layer(x), want) < 4 * 2**-9


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph(kind):
    layer = KINDS[kind][0](torch.randn(50, 70), torch.randn(50))
    # All layers share one forward, and only so many compiled forms of a function are kept.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 5, 70)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("kind", ["e4m3", "e4m3 fast", "nvfp4", "nvfp4 fast"])
def test_fake_operators_are_like_the_real_ones(kind, lead):
    layer, x = KINDS[kind][0](torch.randn(33, 50), torch.randn(33)), torch.randn(*lead, 50).bfloat16()
    rows, operators = quantize(x), getattr(torch.ops, kernels.NAMESPACE)
    operator, arguments = operators.quantized_product, (x, layer.kind, layer.stored, layer.settings, layer.bias, 33)
    if kind == "e4m3 fast":
        operator, arguments = operators.fp8_product, (rows.values, rows.scale, *layer.stored, layer.bias, 33, x.dtype)
    torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("kind", KINDS)
def test_no_host_synchronisation(kind):
    if kind == "nvfp4 fast" and not runs_fp4(torch.device("cuda")):
        pytest.skip("needs Blackwell; the stand-in elsewhere is for comparison only")
    layer = KINDS[kind][0](torch.randn(50, 70), torch.randn(50)).cuda()
    x = torch.randn(2, 5, 70, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = layer(x[:, ::2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_difference(kind):
    weight, difference = torch.randn(50, 70), torch.randn(50, 70)
    layer = KINDS[kind][0](weight, None)
    once = layer.expanded(torch.float32)
    layer.add(difference)
    assert relative(layer.expanded(torch.float32), once + difference) < (0.05 if "e4m3" in kind else 0.12)
    x = torch.randn(9, 70)
    assert relative(layer(x), x @ layer.expanded(torch.float32).t()) < KINDS[kind][1]


def test_rows_are_shared_where_all_read_them():
    x = torch.randn(2, 5, 64)
    weight = torch.randn(32, 64)
    fast = [Fp8MatmulLinear.quantize(weight, None, E4M3), Nvfp4Fp8Linear.quantize(weight, None)]
    rows = shared_input(x, *fast)
    assert all(torch.equal(layer(rows), layer(x)) for layer in fast)
    assert rows.to(torch.float32).shape == x.shape and relative(rows.to(torch.float32), x) < 0.04
    measured = Fp8MatmulLinear(*quantize_rows(torch.randn(32, 64), E4M3), None, torch.tensor(0.02))
    for other in (nn.Linear(64, 32), measured, Fp8Linear.quantize(torch.randn(32, 64), None, E4M3)):
        assert shared_input(x, *fast, other) is x


def test_a_scale_from_the_file_saturates():
    weight, scale = torch.randn(32, 64), torch.tensor(0.01)
    layer = Fp8MatmulLinear(*quantize_rows(weight, E4M3), None, scale)
    x = torch.randn(9, 64)
    x[0, 0], x[1, 1] = 100.0, -100.0
    want = x.clamp(-4.48, 4.48).double() @ layer.expanded(torch.float64).t()
    assert relative(layer(x), want) < 0.06


def test_rows_keep_their_own_precision():
    # One row a million times larger than another: a scale for the tensor would lose the small one.
    x = torch.stack((torch.randn(64), torch.randn(64) * 1e6))
    layer = Fp8MatmulLinear.quantize(torch.randn(32, 64), None, E4M3)
    want = x.double() @ layer.expanded(torch.float64).t()
    assert all(relative(got, row) < 0.06 for got, row in zip(layer(x), want, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_show(bad):
    x = torch.randn(4, 64)
    x[2, 7] = bad
    layer = Fp8MatmulLinear.quantize(torch.randn(32, 64), None, E4M3)
    got = layer(x)
    assert got[2].isnan().any() and got[[0, 1, 3]].isfinite().all()


def test_fused_forms_equal_their_steps():
    x, gain, shift = torch.randn(2, 5, 64), torch.rand(2, 1, 64) + 0.5, torch.randn(2, 1, 64)
    plain = quantize(torch.nn.functional.gelu(x, approximate="tanh"))
    assert relative(gelu_quantize(x).to(torch.float32), plain.to(torch.float32)) < 1e-3
    normed = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-6) * gain.double() + shift.double()
    assert relative(norm_quantize(x, gain, shift, 1e-6).to(torch.float32), normed) < 0.04


def plain_layer(features=24, columns=40, bias=True):
    layer = nn.Linear(columns, features, bias=bias)
    layer.weight = nn.Parameter(layer.weight.data.mul(50).to(E4M3), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "columns"), [(33, 47), (160, 2080)])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_the_one_that_is_stored(kind, features, columns, dtype):
    layer = KINDS[kind][0](torch.randn(features, columns) * 0.1, None)
    got, want = weight_of(layer, dtype), layer.expanded(torch.float64)
    assert got.shape == (features, columns) and got.dtype == dtype and got.is_contiguous()
    assert relative(got, want) < {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 4e-4}[dtype]


def test_weight_of_a_plain_layer_is_its_own():
    layer = nn.Linear(7, 5)
    assert weight_of(layer, torch.float32) is layer.weight and weight_of(layer, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", ["float", *KINDS])
def test_a_layer_is_plain_unless_it_is_of_another_class_or_watched(kind):
    layer = nn.Linear(32, 16) if kind == "float" else KINDS[kind][0](torch.randn(16, 32), torch.randn(16))
    assert is_plain(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not is_plain(layer)
        handle.remove()
    layer.__class__ = type("WithMore", (type(layer),), {})
    assert not is_plain(layer)


def test_weight_operator_is_well_formed():
    layer = Fp8Linear.quantize(torch.randn(5, 7), None, E4M3)
    operator = getattr(torch.ops, kernels.NAMESPACE).quantized_weight.default
    given = (layer.kind, list(layer.stored), list(layer.settings), [5, 7], torch.bfloat16)
    torch.library.opcheck(operator, given, test_utils="test_faketensor")


@pytest.mark.parametrize("scale", [None, torch.tensor(0.02), torch.rand(24) + 0.01, torch.rand(24, 1) + 0.01])
@pytest.mark.parametrize("bias", [True, False])
def test_public_functions_work_in_place(scale, bias):
    layer = plain_layer(bias=bias)
    module = nn.Sequential(layer, nn.Linear(24, 8))
    if scale is not None:
        layer.scale_weight = scale
    x = torch.randn(2, 3, 40).transpose(0, 1)
    weight = layer.weight.double() * (1 if scale is None else scale.double().reshape(-1, 1))
    want = x.double() @ weight.t() + (layer.bias.double() if bias else 0)
    before = bits(x)
    direct = fp8_linear_forward(layer, torch.bfloat16, x)
    assert relative(direct, want) < 0.06 and direct.dtype == torch.bfloat16
    calls = []
    layer.register_forward_pre_hook(lambda _, given: calls.append(given[0].is_contiguous()))
    convert_fp8_linear(module, torch.bfloat16, {"head"}, None if scale is None else {"0.scale_weight": scale})
    assert module[0] is layer and isinstance(layer, Fp8MatmulLinear) and type(module[1]) is nn.Linear
    assert torch.equal(layer(x.bfloat16()), direct)
    assert torch.equal(fp8_linear_forward(layer, torch.bfloat16, x), direct) and calls == [False, True]
    assert torch.equal(bits(x), before)
    convert_fp8_linear(module, torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), direct)


def test_public_functions_leave_other_layers():
    module = nn.ModuleDict({"multitalk_audio_proj": plain_layer(), "ffn": plain_layer()})
    convert_fp8_linear(module, torch.bfloat16, {"multitalk_audio_proj"}, {"ffn.scale_input": torch.tensor(0.5)})
    assert type(module["multitalk_audio_proj"]) is nn.Linear
    assert module["ffn"].scale_input == 0.5
    convert_fp8_linear(nn.Sequential(plain := nn.Linear(8, 8)), torch.float32)
    x = torch.randn(3, 8)
    assert torch.equal(fp8_linear_forward(plain, torch.float32, x), plain(x))
    plain.original_forward = lambda x: (x, "state")
    assert torch.equal(fp8_linear_forward(plain, torch.float32, x), x)
    assert fp8_linear_forward(plain, torch.float32, torch.randn(8, 3).t()).is_contiguous()


def test_the_audio_projection_is_kept_by_name():
    for layer in ("proj1", "proj1_vf", "proj2", "proj3", "norm"):
        assert keeps_precision(f"multitalk_audio_proj.{layer}") and keeps_precision(f"audio_proj.{layer}")
    for layer in ("audio_cross_attn.q_linear", "audio_cross_attn.proj", "self_attn.o", "cross_attn.k_img", "ffn.0"):
        assert not keeps_precision(f"blocks.0.{layer}")
    # The original's own list names it too, for those who pass a part of the list.
    assert "multitalk_audio_proj" in KEEP
    module = nn.ModuleDict({"multitalk_audio_proj": plain_layer(), "ffn": plain_layer()})
    convert_fp8_linear(module, torch.bfloat16, KEEP)
    assert type(module["multitalk_audio_proj"]) is nn.Linear and isinstance(module["ffn"], Fp8MatmulLinear)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("biased", [True, False])
def test_products_on_a_cpu_need_no_kernel_of_torchs(dtype, biased, monkeypatch):
    """`_scaled_mm` takes a scale a row there in its latest versions alone."""
    monkeypatch.delattr(torch, "_scaled_mm")
    bias = torch.randn(50) if biased else None
    layer, x = Fp8MatmulLinear.quantize(torch.randn(50, 70), bias, dtype), torch.randn(2, 3, 70).bfloat16()
    rows = quantize(x).to(torch.float64)
    want = rows @ layer.expanded(torch.float64).T + (bias.bfloat16().double() if biased else 0)
    assert relative(layer(x).double(), want) < 3e-3


def test_nvfp4_bytes_are_comfy_kitchens():
    from comfy_kitchen import dequantize_nvfp4

    weight = torch.randn(144, 96)
    q = quantize_nvfp4(weight)
    want = dequantize_nvfp4(q.codes, q.scale, q.block_scale, output_type=torch.float32)
    assert relative(values_of(q), want) < 1e-6
    assert q.block_scale.shape == (256, 8) and q.codes.shape == (144, 48)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("std", [1e-5, 1e-4, 2e-2])
def test_nvfp4_of_small_weights_in_float16(std, device):
    # The scale of the first is below float16's least number, that of the others among its subnormal ones.
    layer = Nvfp4Linear.quantize(torch.randn(50, 70) * std, None).to(device)
    x = torch.randn(9, 70, device=device).half()
    assert relative(layer(x), x.double() @ layer.expanded(torch.float64).t()) < 5e-3


def test_nvfp4_weights_are_not_rounded_before_they_are_quantized(monkeypatch):
    asked, quantize = [], comfy_kitchen.quantize_nvfp4
    monkeypatch.setattr(
        comfy_kitchen, "quantize_nvfp4", lambda t, *a, **k: asked.append(t.dtype) or quantize(t, *a, **k)
    )
    weight = torch.randn(32, 64)
    want = Nvfp4Linear.quantize(weight, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    layer = Nvfp4Linear.quantize(weight, None)
    assert torch.equal(layer.weight, want.weight) and torch.equal(bits(layer.weight_scale), bits(want.weight_scale))
    layer.add(torch.randn(32, 64))
    assert asked == [torch.float32] * 3


@pytest.mark.cuda
def test_nvfp4_weights_of_a_gpu_are_those_of_the_cpu():
    weight = torch.randn(512, 512)
    ours, theirs = Nvfp4Linear.quantize(weight, None), Nvfp4Linear.quantize(weight.cuda(), None).cpu()
    assert torch.allclose(ours.weight_scale_2, theirs.weight_scale_2, rtol=2**-22, atol=0)
    assert (ours.weight != theirs.weight).float().mean() < 1e-4


def test_nvfp4_fills_up_odd_columns_of_files():
    q = quantize_nvfp4(torch.randn(32, 64))
    narrow = Nvfp4(q.codes[:, :24].contiguous(), q.block_scale, q.scale)
    layer = Nvfp4MatmulLinear(narrow, (32, 48), None)
    assert layer.weight.shape == (32, 32)
    x = torch.randn(4, 48)
    assert relative(layer(x), x.double() @ values_of(q)[:, :48].double().t()) < 0.2


@pytest.mark.parametrize(
    ("capability", "error", "match"),
    [
        ((8, 6), None, r"compute capability 8\.6, and they need 8\.9"),
        ((9, 0), ImportError("they need the package 'triton'."), r"ImportError: they need the package 'triton'$"),
        ((9, 0), RuntimeError("not supported\nmore"), r"RuntimeError: not supported$"),
        ((9, 0), AssertionError(), r"AssertionError: no message$"),
    ],
)
def test_why_fp8_does_not_run(capability, error, match, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch, "ones", fails)
    assert re.search(match, runs_fp8(torch.device("cuda")))


def test_where_fp8_runs():
    assert runs_fp8(torch.device("cpu")) is None
    assert "mps" in runs_fp8(torch.device("mps"))
