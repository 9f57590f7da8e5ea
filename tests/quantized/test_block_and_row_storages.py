"""MXFP8, INT8, INT4 and W4A8 layers against float64, from what the formats' papers and files say.

The decoders here are this file's own, one a storage; comfy-kitchen makes the codes that they read.
"""

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.quantization import quantize_int8_convrot_weight, quantize_int8_rowwise
from comfy_kitchen.registry import registry
from layouts import relative
from wanvideo_wrapper import kernels
from wanvideo_wrapper.quantized.int4 import Int4Linear, Int4MatmulLinear
from wanvideo_wrapper.quantized.int8 import Int8Linear, Int8MatmulLinear, hadamard, rotated
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8Linear, Mxfp8MatmulLinear
from wanvideo_wrapper.quantized.w4a8 import W4a8, W4a8Linear, W4a8MatmulLinear


def turned(kind, group, **options):
    def make(weight, bias):
        layer = kind.quantize(weight, bias, group)
        vars(layer).update(options)
        return layer

    return make


def w4a8(kind, **options):
    """options: of comfy-kitchen's quantization."""

    def make(weight, bias):
        group = options.pop("group_size", 16)
        with registry.use_backend("eager"):
            codes, rel, row, correction, book = comfy_kitchen.quantize_w4a8_int8_weight(weight, group, 64, **options)
        return kind(W4a8(codes, rel, row, book, correction, group, 64), bias)

    return make


# Kind -> layer of weight and bias; how far its values may be from the weight, and its product from that of its values.
KINDS = {
    "mxfp8": (Mxfp8Linear.quantize, 0.04, 0),
    "mxfp8 fast": (Mxfp8MatmulLinear.quantize, 0.04, 0.04),
    "int8": (Int8Linear.quantize, 0.02, 0),
    "int8 fast": (Int8MatmulLinear.quantize, 0.02, 0.015),
    "int8 rotated": (turned(Int8Linear, 64), 0.02, 0),
    "int8 rotated, fast": (turned(Int8MatmulLinear, 64), 0.02, 0.015),
    "int4": (turned(Int4Linear, 64), 0.2, 0),
    "int4 by int8": (turned(Int4MatmulLinear, 64, four_bits=False), 0.2, 0.015),
    "int4 fast": (turned(Int4MatmulLinear, 64), 0.2, 0.2),
    "w4a8": (w4a8(W4a8Linear), 0.1, 0),
    "w4a8 fast": (w4a8(W4a8MatmulLinear), 0.1, 0.015),
    "w4a8 with a correction, fast": (w4a8(W4a8MatmulLinear, symmetric=False), 0.12, 0.02),
    "w6a8 fast": (w4a8(W4a8MatmulLinear, bits=6), 0.03, 0.015),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(48, 64), (50, 192), (5, 128), (130, 320)])
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind, shape, dtype):
    make, loss, tolerance = KINDS[kind]
    weight = torch.randn(shape) * 0.1
    for bias in (torch.randn(shape[0]).to(dtype), None):
        layer = make(weight, bias)
        stored = layer.expanded(torch.float64)
        assert stored.shape == shape and 0 < relative(stored, weight) < loss
        for lead in ((), (7,), (2, 3)):
            x = torch.randn(*lead, shape[1]).to(dtype)
            before = x.clone()
            want = x.double() @ stored.t() + (0 if bias is None else bias.double())
            got = layer(x)
            assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
            # A few results average no rounding of the activation out, nor do those of one row, which share it.
            rounding = tolerance * (3 if not lead or want.numel() < 100 else 1)
            assert relative(got, want) < rounding + TOLERANCE[dtype] and torch.equal(x, before)
        assert layer(torch.randn(0, shape[1]).to(dtype)).shape == (0, shape[0])
    with pytest.raises(ValueError, match="its input has 3"):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph_added_difference_and_fake_operator(kind):
    layer, x = KINDS[kind][0](torch.randn(50, 64), torch.randn(50)), torch.randn(2, 5, 64)
    # All layers share one forward, and only so many compiled forms of a function are kept.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), layer(x))
    operator = getattr(torch.ops, kernels.NAMESPACE).quantized_product.default
    arguments = (x.bfloat16(), layer.kind, layer.stored, layer.settings, layer.bias, 50)
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
    names, difference = [name for name, _ in layer.named_parameters()], torch.randn(50, 64)
    want, settings = layer.expanded(torch.float32) + difference, layer.settings
    layer.add(difference)
    assert relative(layer.expanded(torch.float32), want) < max(0.05, KINDS[kind][1])
    assert [name for name, _ in layer.named_parameters()] == names and layer.settings == settings


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "capability", "fast"),
    [
        ("int8", (7, 0), Int8Linear), ("int8", (7, 5), Int8MatmulLinear), ("int8", None, Int8MatmulLinear),
        ("int4", (7, 5), Int4Linear), ("int4", (9, 0), Int4MatmulLinear), ("w4a8", (7, 5), W4a8Linear),
        ("w4a8", (8, 0), W4a8MatmulLinear), ("mxfp8", (9, 0), Mxfp8Linear), ("mxfp8", (12, 0), Mxfp8MatmulLinear),
        ("mxfp8", None, Mxfp8Linear),
    ],
)  # fmt: skip
def test_the_card_decides_on_the_product(kind, capability, fast, monkeypatch):
    layer = KINDS[kind][0](torch.randn(32, 64), None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert type(layer).fast_kind(CPU if capability is None else GPU) is fast
    assert type(layer).fast_kind(torch.device("mps")) is type(layer)


def bits_of(codes, shifts, mask):
    """Bytes [N, m] -> their parts, one behind the other, [N, m * len(shifts)]."""
    return torch.stack([codes.view(torch.uint8).int() >> shift & mask for shift in shifts], dim=-1).flatten(1)


def turn(values, group):
    """ConvRot's rotation by its definition: Kronecker powers of a matrix of ones with -1 on the other diagonal."""
    base = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    matrix = base
    while len(matrix) < group:
        matrix = torch.kron(matrix, base)
    return torch.cat([part @ matrix.t() / group**0.5 for part in values.split(group, dim=1)], dim=1)


@pytest.mark.parametrize("shape", [(50, 70), (33, 64), (160, 320)])
def test_mxfp8_is_codes_times_powers_of_two(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    with registry.use_backend("eager"):
        codes, scale = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
    # cuBLAS' order: tiles of 128 rows and 4 columns of scales, in which rows 0, 32, 64 and 96 lie side by side.
    want, tiles = torch.zeros(codes.shape, dtype=torch.float64), -(-codes.shape[1] // 128)
    exponents = scale.view(torch.uint8).flatten()
    for row in range(codes.shape[0]):
        for block in range(codes.shape[1] // 32):
            tile = row // 128 * tiles + block // 4
            place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            columns = slice(32 * block, 32 * block + 32)
            want[row, columns] = codes[row, columns].double() * 2.0 ** (int(exponents[place]) - 127)
    for layer in (Mxfp8Linear(codes, scale, shape, None), Mxfp8Linear.quantize(weight, None)):
        assert torch.equal(layer.expanded(torch.float64), want[: shape[0], : shape[1]])


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotated_int8_is_comfy_kitchens(group):
    weight = torch.randn(40, 512) * torch.logspace(-1, 1, 512)
    codes, scale = quantize_int8_convrot_weight(weight, group)
    layer = Int8Linear(codes, scale, None, group)
    assert relative(layer.expanded(torch.float32), turn(codes.double() * scale, group)) < 1e-6
    assert relative(layer.expanded(torch.float32), weight) < 0.02
    matrix = hadamard(group, CPU)
    torch.testing.assert_close(matrix @ matrix, torch.eye(group), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated(rotated(weight, group), group), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [2, 8, 32, 3])
def test_a_rotation_of_another_size_is_refused(group):
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(group, CPU)


def test_int8_with_one_scale_and_with_one_a_row():
    codes, scale = quantize_int8_rowwise(torch.randn(40, 96))
    rows = Int8Linear(codes, scale, None).expanded(torch.float32)
    assert torch.equal(rows, codes.float() * scale)
    one = Int8Linear(codes, torch.tensor(0.25), None)
    assert torch.equal(one.expanded(torch.float32), codes.float() * 0.25)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_int4_is_signed_halves_of_bytes(group):
    weight = torch.randn(40, 256)
    with registry.use_backend("eager"):
        codes, scale = comfy_kitchen.quantize_convrot_w4a4_weight(weight, group)
    numbers = bits_of(codes, (0, 4), 15)
    want = turn(torch.where(numbers > 7, numbers - 16, numbers).double() * scale[:, None], group)
    for layer in (Int4Linear(codes, scale, None, group), Int4Linear.quantize(weight, None, group)):
        assert torch.equal(layer.weight, codes) and relative(layer.expanded(torch.float64), want) < 1e-6
    # Codes that no quantizer writes are read too.
    every = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)
    numbers = bits_of(every, (0, 4), 15)
    want = turn(torch.where(numbers > 7, numbers - 16, numbers).double(), group)
    assert relative(Int4Linear(every, torch.ones(2), None, group).expanded(torch.float64), want) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {}, {"group_size": 4}, {"group_size": 32}, {"scale_dtype": torch.float32}, {"codebook": False},
        {"symmetric": False}, {"bits": 6}, {"bits": 6, "group_size": 32},
    ],
    ids=str,
)  # fmt: skip
def test_w4a8_is_levels_on_the_grid_of_int8(options):
    group = options.get("group_size", 16)
    layer = w4a8(W4a8Linear, **options)(torch.randn(24, 128), None)
    codes, width = layer.weight, 64
    numbers, levels = bits_of(codes[:, :width], (0, 4), 15), torch.arange(-8, 8).double()
    if codes.shape[1] > width:
        numbers, levels = numbers + 16 * bits_of(codes[:, width:], (0, 2, 4, 6), 3), torch.arange(-32, 32).double()
    if layer.weight_codebook is not None:
        levels = layer.weight_codebook.double()
    spread = layer.weight_s_rel.double().repeat_interleave(group, dim=1)
    want = (levels[numbers] * spread).round().clamp(-127, 127) * layer.weight_s_channel.double()[:, None]
    if layer.weight_correction is not None:
        want = want + layer.weight_correction.double().t().repeat_interleave(group, dim=1)
    assert relative(layer.expanded(torch.float64), turn(want, 64)) < 1e-6
