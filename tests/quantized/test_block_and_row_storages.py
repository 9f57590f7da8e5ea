"""MXFP8 and INT8 layers against comfy-kitchen's plain forms, and NVFP4 as LightX2V and ModelOpt write it."""

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.quantization import (
    dequantize_int8_convrot_weight,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
)
from comfy_kitchen.registry import registry
from layouts import relative
from wanvideo_wrapper import kernels
from wanvideo_wrapper.quantized.int8 import Int8Linear, hadamard, rotated
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8Linear

KINDS = {
    "mxfp8": Mxfp8Linear.quantize,
    "int8": Int8Linear.quantize,
    "int8 rotated": lambda weight, bias: Int8Linear.quantize(weight, bias, 64),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(48, 64), (50, 192), (5, 128), (130, 320)])
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind, shape, dtype):
    weight = torch.randn(shape) * 0.1
    for bias in (torch.randn(shape[0]).to(dtype), None):
        layer = KINDS[kind](weight, bias)
        stored = layer.expanded(torch.float64)
        assert stored.shape == shape and 0 < relative(stored, weight) < 0.05
        for lead in ((), (7,), (2, 3)):
            x = torch.randn(*lead, shape[1]).to(dtype)
            want = x.double() @ stored.t() + (0 if bias is None else bias.double())
            got = layer(x)
            assert got.shape == want.shape and got.dtype == dtype and relative(got, want) < TOLERANCE[dtype]
        assert layer(torch.randn(0, shape[1]).to(dtype)).shape == (0, shape[0])
    with pytest.raises(ValueError, match="its input has 3"):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph_and_added_difference(kind):
    layer, x = KINDS[kind](torch.randn(50, 64), torch.randn(50)), torch.randn(2, 5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), layer(x))
    difference = torch.randn(50, 64)
    want = layer.expanded(torch.float32) + difference
    layer.add(difference)
    assert relative(layer.expanded(torch.float32), want) < 0.05


def test_fake_operators_are_like_the_real_ones():
    x, bias = torch.randn(2, 3, 64).bfloat16(), torch.randn(50)
    int8, mxfp8 = (KINDS[kind](torch.randn(50, 64), bias) for kind in ("int8 rotated", "mxfp8"))
    arguments = {
        "int8_weight_only": (x, int8.weight, int8.scale_weight, 64, bias),
        "mxfp8_weight_only": (x, mxfp8.weight, mxfp8.weight_scale, bias, 50),
    }
    for name, given in arguments.items():
        operator = getattr(getattr(torch.ops, kernels.NAMESPACE), name).default
        torch.library.opcheck(operator, given, test_utils="test_faketensor")


@pytest.mark.parametrize("shape", [(50, 70), (33, 64), (160, 320)])
def test_mxfp8_is_comfy_kitchens(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    with registry.use_backend("eager"):
        codes, scale = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
        want = comfy_kitchen.dequantize_mxfp8(codes, scale, torch.float32)[: shape[0], : shape[1]]
    got = Mxfp8Linear(codes, scale, shape, None)
    assert torch.equal(got.expanded(torch.float32), want)
    own = Mxfp8Linear.quantize(weight, None)
    assert torch.equal(own.expanded(torch.float32), want)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotated_int8_is_comfy_kitchens(group):
    weight = torch.randn(40, 512) * torch.logspace(-1, 1, 512)
    codes, scale = quantize_int8_convrot_weight(weight, group)
    want = dequantize_int8_convrot_weight(codes, scale, group)
    layer = Int8Linear(codes, scale, None, group)
    torch.testing.assert_close(layer.expanded(torch.float32), want, rtol=1e-5, atol=1e-5)
    assert relative(layer.expanded(torch.float32), weight) < 0.02
    matrix = hadamard(group, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(group), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated(rotated(weight, group), group), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [2, 8, 32, 3])
def test_a_rotation_of_another_size_is_refused(group):
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(group, torch.device("cpu"))


def test_int8_with_one_scale_and_with_one_a_row():
    codes, scale = quantize_int8_rowwise(torch.randn(40, 96))
    rows = Int8Linear(codes, scale, None).expanded(torch.float32)
    assert torch.equal(rows, codes.float() * scale)
    one = Int8Linear(codes, torch.tensor(0.25), None).expanded(torch.float32)
    assert torch.equal(one, codes.float() * 0.25)
