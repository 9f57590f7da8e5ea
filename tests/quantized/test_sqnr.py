"""Signal to quantization noise of the row lengths of the 14B model, against float64, on activations with outliers."""

import functools

import pytest
import torch
from layouts import sqnr
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Fp8Linear, Nvfp4Linear, Nvfp4MatmulLinear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS, OUTLIERS, OUTLIER_SCALE = 32, 20, 20
# Outputs are independent of each other, so that some of them show what all 5,120 or 13,824 do.
SIZES = [(512, 5120), (512, 13824)]
# Kind -> layer of a weight, and the least SQNR in dB.
FLOORS = {
    "e4m3": (lambda w: Fp8Linear.quantize(w, None, E4M3), 31.0),
    "e4m3 fast": (lambda w: Fp8MatmulLinear.quantize(w, None, E4M3), 28.0),
    "e5m2": (lambda w: Fp8Linear.quantize(w, None, E5M2), 25.0),
    "e5m2 fast": (lambda w: Fp8MatmulLinear.quantize(w, None, E5M2), 24.0),
    "nvfp4": (lambda w: Nvfp4Linear.quantize(w, None), 20.0),
    "nvfp4 from fp8": (lambda w: Nvfp4Linear.quantize(from_fp8(w), None), 19.7),
    "nvfp4 by fp8": (lambda w: Nvfp4Fp8Linear.quantize(w, None), 19.3),
    "nvfp4 fast": (lambda w: Nvfp4MatmulLinear.quantize(w, None), 17.0),
}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]


def from_fp8(weight):
    return Fp8Linear.quantize(weight, None, E4M3).expanded(torch.float32)


@functools.lru_cache(maxsize=1)
def problem(features, columns):
    generator = torch.Generator().manual_seed(features)
    weight = torch.randn(features, columns, generator=generator) * 0.02
    x = torch.randn(TOKENS, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:OUTLIERS]] *= OUTLIER_SCALE
    x = x.bfloat16()
    return weight, x, x.double() @ weight.double().t()


def unit_scales(weight, x):
    """The original pack's product: activations clamped and cast with scale 1, weights cast or with a scale a tensor."""
    act = x.float().clamp(-448, 448).to(E4M3).double()
    scale = weight.abs().max() / 448
    return act @ weight.to(E4M3).double().t(), act @ ((weight / scale).to(E4M3).double() * scale).t()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", FLOORS)
def test_floor(size, kind, device):
    weight, x, want = problem(*size)
    make, floor = FLOORS[kind]
    layer = make(weight).to(device)
    got = layer(x.to(device)).cpu()
    assert sqnr(got, want) >= floor


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_better_than_unit_scales(size):
    weight, x, want = problem(*size)
    ours = sqnr(Fp8MatmulLinear.quantize(weight, None, E4M3)(x), want)
    # Activations of other layers are smaller or larger; a scale of 1 suits only one magnitude.
    small = sqnr(Fp8MatmulLinear.quantize(weight, None, E4M3)(x / 256), want / 256)
    plain, scaled = (sqnr(got, want) for got in unit_scales(weight, x))
    plain_small, scaled_small = (sqnr(got, want / 256) for got in unit_scales(weight, x / 256))
    assert ours > max(plain, scaled) and small > max(plain_small, scaled_small) + 6
