"""Every quantised entry point takes every layout: the result is that of plain memory, and the input is unchanged.

WAN_LAYOUT_EXAMPLES sets how many layouts are generated for each entry point.
"""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import DTYPES, Layout, bits, fresh, layouts, relative
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.fp8_optimization import convert_fp8_linear, fp8_linear_forward
from wanvideo_wrapper.kernels.fp8_rows import gelu_quantise, norm_quantise, quantise
from wanvideo_wrapper.kernels.nvfp4 import expand
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear, quantise_rows
from wanvideo_wrapper.quantized.nvfp4 import (
    Nvfp4,
    Nvfp4Fp8Linear,
    Nvfp4Linear,
    Nvfp4MatmulLinear,
    quantise_nvfp4,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The second size is padded when a layer is made.
SIZE, ODD_SIZE = (48, 64), (33, 50)
FEATURES, COLUMNS = SIZE
EXAMPLES = int(os.environ.get("WAN_LAYOUT_EXAMPLES", "2000" if torch.cuda.is_available() else "25"))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False, database=None
)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]
LEADS = ((), (1,), (9,), (2, 5), (1, 1), (2, 3, 4), (0,), (2, 0))


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
def in_nvfp4(size):
    return quantise_nvfp4(weights(torch.float32, size)[0])


def entry_points(device, dtype, lay, shape=SIZE):
    """Name -> function of x; weights, scales and biases lie as `lay` puts them."""
    weight, bias = weights(dtype, shape)
    (e4, s4), (e5, s5) = (quantise_rows(weight, kind) for kind in (E4M3, E5M2))
    q = in_nvfp4(shape)
    e4, s4, e5, s5, bias = (lay(t.to(device)) for t in (e4, s4, e5, s5, bias))
    q = Nvfp4(*(lay(t.to(device)) for t in q))
    measured = lay(torch.full((1,), 0.05, device=device))[0]
    gain, shift = (lay(torch.rand(1, 1, shape[1], device=device)) for _ in range(2))
    factor = torch.ones(q.codes.shape[0], 1, device=device)
    layer = plain(device, e4, s4, bias)

    def rows(quantiser):
        return lambda x: quantiser(x).to(torch.float32)

    def three(x):
        return x.reshape(1, -1, shape[1]) if x.dim() != 3 else x

    return {
        "e4m3": Fp8Linear(e4, s4, bias),
        "e5m2": Fp8Linear(e5, s5, bias),
        "e4m3 fast": Fp8MatmulLinear(e4, s4, bias),
        "e5m2 fast": Fp8MatmulLinear(e5, s5, bias),
        "e4m3 fast, scale from the file": Fp8MatmulLinear(e4, s4, bias, measured),
        "nvfp4": Nvfp4Linear(q, shape, bias),
        "nvfp4 by fp8": Nvfp4Fp8Linear(q, shape, bias),
        "nvfp4 fast": Nvfp4MatmulLinear(q, shape, bias),
        "nvfp4 fast, scale from the file": Nvfp4MatmulLinear(q, shape, bias, measured),
        "fp8_linear_forward": lambda x: fp8_linear_forward(layer, dtype, x),
        "convert_fp8_linear": converted(plain(device, e4, s4, bias)),
        "quantise": rows(quantise),
        "gelu": rows(gelu_quantise),
        "norm": lambda x: norm_quantise(three(x), gain, shift, 1e-6).to(torch.float32),
        "expand": lambda x: expand(q.codes, q.block_scale, factor).float(),
    }


ENTRY_POINTS = list(entry_points("cpu", torch.float32, lambda t: t))
LAYERS = [entry for entry in ENTRY_POINTS if entry.startswith(("e4m3", "e5m2", "nvfp4"))]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_any_activation(entry, device):
    functions = {dtype: entry_points(device, dtype, fresh)[entry] for dtype in DTYPES}

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

    @settings(SETTINGS, max_examples=max(EXAMPLES // 10, 10))
    @given(layouts().filter(lambda layout: layout.kind != "expanded"), st.sampled_from(DTYPES))
    def check(layout, dtype):
        torch.manual_seed(layout.seed)
        got = entry_points(device, dtype, layout.place, size)[entry](x[dtype])
        torch.manual_seed(layout.seed)
        want = entry_points(device, dtype, fresh, size)[entry](x[dtype])
        assert got.isfinite().all() and relative(got, want) < 5e-3

    check()


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", LAYERS)
def test_parameters_moved_to_odd_addresses(entry, device, monkeypatch):
    # What a packed swap buffer does to a layer behind its back.
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    layer = entry_points(device, torch.bfloat16, fresh)[entry]
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
    (e4, s4), q = quantise_rows(weight, E4M3), quantise_nvfp4(weight)
    stored = {"a": torch.ones(odd, dtype=torch.uint8), "e4": e4, "s4": s4, "bias": bias, "codes": q.codes,
              "blocks": q.block_scale, "scale": q.scale.reshape(1)}  # fmt: skip
    save_file(stored, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        mapped = {key: file.get_tensor(key) for key in stored}
    x = torch.randn(2, 5, COLUMNS)
    for kind in (Fp8Linear, Fp8MatmulLinear):
        assert torch.equal(kind(mapped["e4"], mapped["s4"], mapped["bias"])(x), kind(e4, s4, bias)(x))
    given_q = Nvfp4(mapped["codes"], mapped["blocks"], mapped["scale"].reshape(()))
    for kind in (Nvfp4Linear, Nvfp4Fp8Linear, Nvfp4MatmulLinear):
        assert torch.equal(kind(given_q, weight.shape, mapped["bias"])(x), kind(q, weight.shape, bias)(x))
