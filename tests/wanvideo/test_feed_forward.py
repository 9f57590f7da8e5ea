"""The GELU within the first product of the feed-forward: what it gives, and where it must not run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.quantized.fp8 import Fp8Linear
from wanvideo_wrapper.wanvideo.modules import layers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def layer_of(dtype, device="cpu", **options):
    return nn.Linear(32, 48, device=device, **options).to(dtype).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 0), (0, 5)])
def test_equals_float64(shape, dtype, device):
    layer, x = layer_of(dtype, device), torch.randn(*shape, 32, device=device).to(dtype) * 3
    want = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    got = layers.linear_gelu(x, layer)
    assert got.dtype == dtype and got.shape == want.shape
    assert not got.numel() or (got.double() - want).norm() < 6e-3 * want.norm()


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(layers, "_runs_fused", lambda x: True)


class Beside(nn.Linear):
    """As a layer with a LoRA."""


@pytest.mark.usefixtures("fused")
def test_only_where_the_layer_is_a_product_and_a_bias():
    layer, x = layer_of(torch.bfloat16), torch.randn(3, 32).bfloat16()
    assert layers._has_gelu_epilogue(x, layer) and layers._has_gelu_epilogue(x.half(), layer_of(torch.float16))
    other = Beside(32, 48).bfloat16()
    quantized = Fp8Linear.quantize(layer.weight, layer.bias, torch.float8_e4m3fn)
    for unfit in (other, quantized, layer_of(torch.bfloat16, bias=False), layer_of(torch.float16)):
        assert not layers._has_gelu_epilogue(x, unfit)
    assert not layers._has_gelu_epilogue(quantize(x), layer)
    assert not layers._has_gelu_epilogue(x.float(), layer_of(torch.float32))


@torch.no_grad()
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_that_is_watched_is_called(register):
    forward, seen = layers.FeedForward(32, 48).bfloat16(), []
    getattr(forward[0], register)(lambda *_: seen.append(register))
    forward(torch.randn(2, 3, 32).bfloat16())
    assert seen == [register]
