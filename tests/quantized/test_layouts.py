"""Every quantized entry point takes every layout: the result is that of plain memory, and the input is unchanged.

WAN_LAYOUT_EXAMPLES sets how many layouts are generated for each entry point. Plain values alone would not show that an
argument was left as it was, for the CPU reads any memory: the layout check asserts it at every kernel entry.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, EXAMPLES, SETTINGS, Layout, bits, fresh, layouts, relative, save_in_order
from safetensors import safe_open
from torch import nn
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.fp8_optimization import convert_fp8_linear, fp8_linear_forward
from wanvideo_wrapper.kernels.fp8_rows import gelu_quantize, norm_quantize, quantize
from wanvideo_wrapper.kernels.nvfp4 import expand
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear, quantize_rows
from wanvideo_wrapper.quantized.nvfp4 import (
    Nvfp4,
    Nvfp4Fp8Linear,
    Nvfp4Linear,
    Nvfp4MatmulLinear,
    quantize_nvfp4,
)
from wanvideo_wrapper.tensor_layout import is_kernel_ready

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The second size is padded when a layer is made.
SIZE, ODD_SIZE = (48, 64), (33, 50)
FEATURES, COLUMNS = SIZE
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]
LEADS = ((), (1,), (9,), (2, 5), (1, 1), (2, 3, 4), (0,), (2, 0))


@pytest.fixture(autouse=True)
def checking(monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)


def plain(device, weight, scale, bias):
    layer = nn.Linear(*reversed(weight.shape), device="meta")
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(device), requires_grad=False)
    layer.scale_weight = scale.to(device)
    return layer


def converted(layer):
    convert_fp8_linear(nn.Sequential(layer), torch.float32)
    return layer


def weights(dtype, size=SIZE):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, generator=generator), torch.randn(size[0], generator=generator).to(dtype)


@functools.cache
def stored(size):
    """The weight in E4M3, in E5M2, each with its scales, and in NVFP4."""
    weight, _ = weights(torch.float32, size)
    return *quantize_rows(weight, E4M3), *quantize_rows(weight, E5M2), quantize_nvfp4(weight)


def entry_points(device, dtype, lay, shape=SIZE):
    """Name -> what makes a function of x; weights, scales and biases lie as `lay` puts them."""
    *parts, q = stored(shape)
    e4, s4, e5, s5, bias = (lay(t.to(device)) for t in (*parts, weights(dtype, shape)[1]))
    q = Nvfp4(*(lay(t.to(device)) for t in q))
    measured = lay(torch.full((1,), 0.05, device=device))[0]
    gain, shift = (lay(torch.rand(1, 1, shape[1], device=device)) for _ in range(2))
    # The largest code times the largest block scale, 6 * 448, stays in range.
    factor = lay(torch.full((q.codes.shape[0], 1), 0.125, device=device))

    def rows(quantizer):
        return lambda x: quantizer(x).to(torch.float32)

    def three(x):
        return x.reshape(1, -1, shape[1]) if x.dim() != 3 else x

    return {
        "e4m3": lambda: Fp8Linear(e4, s4, bias),
        "e5m2": lambda: Fp8Linear(e5, s5, bias),
        "e4m3 fast": lambda: Fp8MatmulLinear(e4, s4, bias),
        "e5m2 fast": lambda: Fp8MatmulLinear(e5, s5, bias),
        "e4m3 fast, scale from the file": lambda: Fp8MatmulLinear(e4, s4, bias, measured),
        "nvfp4": lambda: Nvfp4Linear(q, shape, bias),
        "nvfp4 by fp8": lambda: Nvfp4Fp8Linear(q, shape, bias),
        "nvfp4 fast": lambda: Nvfp4MatmulLinear(q, shape, bias),
        "nvfp4 fast, scale from the file": lambda: Nvfp4MatmulLinear(q, shape, bias, measured),
        "fp8_linear_forward": lambda: functools.partial(fp8_linear_forward, plain(device, e4, s4, bias), dtype),
        "convert_fp8_linear": lambda: converted(plain(device, e4, s4, bias)),
        "quantize": lambda: rows(quantize),
        "gelu": lambda: rows(gelu_quantize),
        "norm": lambda: rows(lambda x: norm_quantize(three(x), gain, shift, 1e-6)),
        "expand": lambda: lambda _: expand(q.codes, q.block_scale, factor).float(),
    }


ENTRY_POINTS = list(entry_points("cpu", torch.float32, lambda t: t))
LAYERS = [entry for entry in ENTRY_POINTS if entry.startswith(("e4m3", "e5m2", "nvfp4"))]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", [entry for entry in ENTRY_POINTS if entry != "expand"])
def test_any_activation(entry, device):
    functions = {dtype: entry_points(device, dtype, fresh)[entry]() for dtype in DTYPES}

    @SETTINGS
    @given(layouts(), st.sampled_from(LEADS), st.sampled_from(DTYPES))
    def check(layout, lead, dtype):
        x = layout.build((*lead, COLUMNS), dtype, device)
        before = bits(x)
        got, want = functions[dtype](x), functions[dtype](fresh(x))
        assert torch.equal(bits(x), before)
        assert got.isfinite().all() and relative(got, want) < 5e-3 and got.shape == want.shape

    check()


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [SIZE, ODD_SIZE], ids=str)
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_any_weight(entry, size, device):
    x = {dtype: torch.randn(2, 5, size[1]).to(device, dtype) for dtype in DTYPES}

    # Half of them for each of the two sizes.
    @settings(SETTINGS, max_examples=max(EXAMPLES // 2, 25))
    @given(layouts().filter(lambda layout: layout.kind != "expanded"), st.sampled_from(DTYPES))
    def check(layout, dtype):
        torch.manual_seed(layout.seed)
        function = entry_points(device, dtype, layout.place, size)[entry]()
        assert parameters_are_ready(function)
        got = function(x[dtype])
        torch.manual_seed(layout.seed)
        want = entry_points(device, dtype, fresh, size)[entry]()(x[dtype])
        assert got.isfinite().all() and relative(got, want) < 5e-3

    check()


def parameters_are_ready(function):
    """No operator copies a weight again in every step."""
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return all(is_kernel_ready(parameter, strided=False) for parameter in parameters)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", ["e4m3 fast", "e5m2 fast", "nvfp4 by fp8"])
def test_any_rows(entry, device):
    """Activations that come in FP8, as those of attention do."""
    layer = entry_points(device, torch.bfloat16, fresh)[entry]()

    @SETTINGS
    @given(layouts(), layouts(), st.sampled_from(LEADS), st.sampled_from(DTYPES))
    def check(for_values, for_scale, lead, dtype):
        rows = quantize(for_values.build((*lead, COLUMNS), dtype, device))
        rows = rows._replace(values=for_values.place(rows.values), scale=for_scale.place(rows.scale))
        before = bits(rows.values), bits(rows.scale)
        got, want = layer(rows), layer(rows._replace(values=fresh(rows.values), scale=fresh(rows.scale)))
        assert torch.equal(bits(rows.values), before[0]) and torch.equal(bits(rows.scale), before[1])
        assert got.isfinite().all() and relative(got, want) < 5e-3 and got.shape == want.shape

    check()


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_any_codes(device):
    q = stored(SIZE)[-1]
    factor = torch.exp2(torch.arange(q.codes.shape[0]) % 5 - 2.0)[:, None]

    @SETTINGS
    @given(st.tuples(layouts(), layouts(), layouts()))
    def check(chosen):
        tensors = (q.codes, q.block_scale, factor)
        arguments = [layout.place(t.to(device)) for layout, t in zip(chosen, tensors, strict=True)]
        before = [bits(t) for t in arguments]
        got, want = expand(*arguments), expand(*(fresh(t) for t in arguments))
        assert all(torch.equal(bits(t), b) for t, b in zip(arguments, before, strict=True))
        assert torch.equal(bits(got), bits(want))

    check()


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", LAYERS)
def test_parameters_moved_to_odd_addresses(entry, device):
    # What a packed swap buffer does to a layer behind its back.
    layer = entry_points(device, torch.bfloat16, fresh)[entry]()
    x = torch.randn(2, 5, COLUMNS).to(device, torch.bfloat16)
    want = layer(x)
    for offset in range(1, 16):
        for parameter in layer.parameters():
            parameter.data = Layout("offset", offset, 0).place(parameter.data)
        assert relative(layer(x), want) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("odd", [1, 3, 77, 129])
def test_mapped_files_with_odd_tensors(odd, tmp_path):
    weight, bias = weights(torch.float32)
    (e4, s4), q = quantize_rows(weight, E4M3), quantize_nvfp4(weight)
    tensors = {"e4": e4, "s4": s4, "bias": bias, "codes": q.codes, "blocks": q.block_scale, "scale": q.scale.reshape(1)}
    save_in_order(tmp_path / "m.safetensors", {"a": torch.ones(odd, dtype=torch.uint8), **tensors})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        mapped = {key: file.get_tensor(key) for key in tensors}
    assert not any(is_kernel_ready(t, strided=False) for t in mapped.values())
    x = torch.randn(2, 5, COLUMNS)
    for kind in (Fp8Linear, Fp8MatmulLinear):
        layer = kind(mapped["e4"], mapped["s4"], mapped["bias"])
        assert parameters_are_ready(layer) and torch.equal(layer(x), kind(e4, s4, bias)(x))
    given_q = Nvfp4(mapped["codes"], mapped["blocks"], mapped["scale"].reshape(()))
    for kind in (Nvfp4Linear, Nvfp4Fp8Linear, Nvfp4MatmulLinear):
        layer = kind(given_q, weight.shape, mapped["bias"])
        assert parameters_are_ready(layer) and torch.equal(layer(x), kind(q, weight.shape, bias)(x))
