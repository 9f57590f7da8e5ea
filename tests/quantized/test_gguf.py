"""Every GGUF type against the gguf package's NumPy form, and the layers that hold such blocks."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from layouts import relative
from wanvideo_wrapper.quantized import gguf as ours
from wanvideo_wrapper.quantized.gguf import TYPES, GgufEmbedding, GgufLinear, dequantize
from wanvideo_wrapper.quantized.linear import weight_of

ROWS, BLOCKS = 24, 3
# What gguf takes for the largest scale of NVFP4 where its sign bit is set: a scale has none.
SCALE_BYTES = {"NVFP4": 4}


def random_rows(form):
    """Random blocks whose float16 scales are finite, and their values by the gguf package."""
    kind = GGMLQuantizationType[form]
    size = GGML_QUANT_SIZES[kind][1]
    while True:
        rows = np.random.default_rng(int(torch.randint(2**31, ()))).integers(0, 256, (8 * ROWS, BLOCKS * size), "uint8")
        rows.reshape(len(rows), BLOCKS, size)[..., : SCALE_BYTES.get(form, 0)] &= 0x7F
        with np.errstate(all="ignore"):
            values = quants.dequantize(rows, kind)
        usable = np.isfinite(values).all(1) & (np.abs(values).max(1) < 1e30)
        if usable.sum() >= ROWS:
            return torch.from_numpy(rows[usable][:ROWS]), torch.from_numpy(values[usable][:ROWS])


def test_every_type_of_the_package_is_here():
    assert set(TYPES) == {kind.name for kind in quants._type_traits}


@pytest.mark.parametrize("form", TYPES)
def test_values_are_those_of_the_gguf_package(form, monkeypatch):
    rows, want = random_rows(form)
    assert want.shape[0] == ROWS and want.unique().numel() > 16
    got = dequantize(rows, form, torch.float32)
    assert torch.equal(got, want)
    assert torch.equal(dequantize(rows, form, torch.bfloat16), got.bfloat16())
    monkeypatch.setattr(ours, "MOST_VALUES", 1024)
    assert torch.equal(dequantize(rows, form, torch.float32), got)


@pytest.mark.parametrize("form", ["BF16", "Q4_K", "IQ2_XS", "MXFP4"])
def test_blocks_at_an_odd_address(form):
    rows, _ = random_rows(form)
    size = GGML_QUANT_SIZES[GGMLQuantizationType[form]][1]
    for block in (rows[:1, :size], rows):
        memory = torch.empty(block.numel() + 1, dtype=torch.uint8)
        odd = memory[1:].view(block.shape).copy_(block)
        assert odd.data_ptr() % 2 == 1
        want = dequantize(block.clone(), form, torch.float32)
        assert torch.equal(dequantize(odd, form, torch.float32), want) and want.data_ptr() % 64 == 0


def layer_of(form, bias=None):
    """A layer of weights of ordinary size: the scales of random blocks are not."""
    rows = torch.from_numpy(quants.quantize(torch.randn(40, 512).numpy() * 0.1, GGMLQuantizationType[form]))
    return GgufLinear(rows.view(torch.uint8).reshape(40, -1), form, bias)


QUANTIZED = ("BF16", "Q4_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", QUANTIZED)
def test_product(form, dtype):
    for bias in (torch.randn(40).to(dtype), None):
        layer = layer_of(form, bias)
        weight = quants.dequantize(layer.weight.view(torch.uint8).numpy(), GGMLQuantizationType[form])
        for lead in ((), (1,), (7,), (2, 3)):
            x = torch.randn(*lead, 512).to(dtype)
            want = x.double() @ torch.from_numpy(weight).double().t() + (0 if bias is None else bias.double())
            got = layer(x)
            assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
            assert relative(got, want) < {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert layer(torch.randn(0, 512).to(dtype)).shape == (0, 40)
    with pytest.raises(ValueError, match="reads 512 channels, but its input has 510"):
        layer(torch.randn(2, 510))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", QUANTIZED)
def test_weight_is_never_the_memory_that_is_stored(form, dtype):
    """torch forbids it to an operator, and does not notice it of a view."""
    layer = layer_of(form)
    got = weight_of(layer, dtype)
    assert torch.equal(got, layer.expanded(dtype))
    assert got.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()


def test_full_graph():
    layer, x = layer_of("Q4_0", torch.randn(40)), torch.randn(2, 5, 512)
    # All layers share one forward, and only so many compiled forms of a function are kept.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("form", QUANTIZED)
def test_memory_is_the_blocks_and_no_more(form):
    layer = layer_of(form)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[form]]
    assert sum(p.nbytes for p in layer.parameters()) == 40 * 512 * size // values
    assert (layer.out_features, layer.in_features) == (40, 512)


def test_a_difference_is_added_and_said():
    layer, difference = layer_of("Q4_0"), torch.randn(40, 512) * 0.05
    want = layer.expanded(torch.float64) + difference
    layer.add(difference)
    assert relative(layer.expanded(torch.float64), want) < 2**-8 and "merged LoRA" in layer.label
    x = torch.randn(3, 512)
    assert relative(layer(x), x.double() @ layer.expanded(torch.float64).t()) < 1e-5


def test_an_embedding_expands_the_rows_that_are_asked_for():
    rows, values = random_rows("Q4_K")
    ids = torch.randint(ROWS, (2, 9))
    got = GgufEmbedding(rows, "Q4_K", torch.float32)(ids)
    assert torch.equal(got, values[ids])
    assert GgufEmbedding(rows, "Q4_K", torch.bfloat16)(ids).dtype == torch.bfloat16
