"""The functions that users of the original pack know: on plain layers of every make, with every kind of scale."""

import logging

import pytest
import torch
from layouts import bits, relative
from torch import nn
from wanvideo_wrapper.fp8_optimization import convert_fp8_linear, fp8_linear_forward
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
GPU = [pytest.mark.cuda, pytest.mark.sm89]


def layer_in(dtype=E4M3, columns=50, features=33, kind=nn.Linear):
    layer = kind(columns, features)
    layer.weight.data = layer.weight.data.to(dtype)
    return layer


def exact(layer, x, scale=1.0):
    return x.double() @ layer.weight.double().t() * scale + layer.bias.double()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(50,), (1, 50), (7, 50), (2, 3, 50), (2, 1, 3, 50), (0, 50), (2, 0, 50)])
def test_any_shape(shape, dtype, device):
    layer, x = layer_in(dtype).to(device), torch.randn(shape, device=device)
    before = bits(x)
    got, want = fp8_linear_forward(layer, BF16, x), exact(layer, x)
    assert got.shape == want.shape and got.dtype == BF16 and torch.equal(bits(x), before)
    assert relative(got, want) < 0.06


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("scales", [{}, {"scale_weight": torch.ones(33)}, {"scale_input": torch.tensor(0.5)}])
def test_no_host_synchronisation(scales):
    layer, x = layer_in().cuda(), torch.randn(2, 10, 50, device="cuda", dtype=BF16)[:, ::2]
    for name, scale in scales.items():
        setattr(layer, name, scale.cuda())
    fp8_linear_forward(layer, BF16, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = fp8_linear_forward(layer, BF16, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.isfinite().all()


@pytest.mark.parametrize("columns", [34, 49, 51, 64])
def test_an_input_of_another_width_is_refused(columns):
    with pytest.raises(ValueError, match=f"reads 50 channels, but its input has {columns}"):
        fp8_linear_forward(layer_in(), BF16, torch.randn(2, columns))


NAMES = [("scale_weight", "scale_input"), ("weight_scale", "input_scale")]
# A scale as a file, a module and a caller may have it.
FORMS = [torch.tensor, lambda value: nn.Parameter(torch.tensor([value])), float]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kept", ["keys", "attributes"])
def test_scales_under_both_names(kept, names, form):
    torch._dynamo.reset()
    model = nn.Sequential(layer := layer_in())
    x, scales = torch.randn(9, 50), {names[0]: form(0.01), names[1]: form(0.02)}
    want = exact(layer, x, 0.01)
    if kept == "attributes":
        for name, scale in scales.items():
            setattr(layer, name, scale)
        assert relative(fp8_linear_forward(layer, BF16, x), want) < 0.06
        compiled = torch.compile(lambda x: fp8_linear_forward(layer, BF16, x), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), fp8_linear_forward(layer, BF16, x))
    keys = {f"0.{name}": scale for name, scale in scales.items()} if kept == "keys" else None
    convert_fp8_linear(model, BF16, (), keys)
    assert relative(layer(x), want) < 0.06 and torch.allclose(layer.scale_input, torch.tensor(0.02))
    assert list(layer.state_dict()) == ["weight", "bias", "scale_weight", "scale_input"]


def test_a_scale_of_another_kind_is_refused():
    layer = layer_in()
    layer.scale_weight = "0.5"
    with pytest.raises(TypeError, match="A scale of a layer is a number or a tensor, not str"):
        fp8_linear_forward(layer, BF16, torch.randn(2, 50))
    with pytest.raises(TypeError, match="A scale of a layer is a number or a tensor, not list"):
        convert_fp8_linear(layer_in(), BF16, (), {"scale_input": [0.5]})


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale", "scale_input", "input_scale"])
def test_scales_of_no_layer_are_refused(leaf):
    model = nn.Sequential(nn.Sequential(layer_in()), nn.Linear(33, 8))
    for key in (f"diffusion_model.0.0.{leaf}", f"0.{leaf}", f"3.{leaf}", leaf):
        with pytest.raises(ValueError, match=f"layers that the module does not have: {key}. Name .*without a prefix"):
            convert_fp8_linear(model, BF16, (), {key: torch.tensor(0.5), f"0.0.{leaf}": torch.tensor(0.5)})
    with pytest.raises(ValueError, match=r"x\.7\.\w+ and 2 more\. Name"):
        convert_fp8_linear(model, BF16, (), {f"x.{i}.{leaf}": torch.tensor(0.5) for i in range(10)})
    assert type(model[0][0]) is nn.Linear


def test_scales_of_layers_that_are_left_alone():
    model = nn.ModuleDict({"head": layer_in(), "plain": nn.Linear(50, 33), "conv": nn.Conv1d(4, 4, 1)})
    model["ours"], model["doubling"] = layer_in(), layer_in(kind=Doubling)
    model["tied"] = model["ours"]
    x, keys = torch.randn(3, 50), {f"{name}.weight_scale": torch.tensor(0.5) for name in model if name != "ours"}
    want = exact(model["ours"], x, 0.5)
    convert_fp8_linear(model, BF16, ("head",), keys | {"scaled_fp8": torch.ones(1)})
    assert type(model["head"]) is nn.Linear and relative(model["ours"](x), want) < 0.06


@pytest.mark.parametrize("first", [BF16, torch.float32])
def test_the_base_precision_of_a_converted_layer_can_change(first):
    layer, x = layer_in(), torch.randn(3, 50)
    layer.scale_input = 0.02
    convert_fp8_linear(layer, first)
    want = layer(x)
    assert fp8_linear_forward(layer, torch.float16, x).dtype == torch.float16
    convert_fp8_linear(layer, torch.float16)
    got = layer(x)
    assert got.dtype == layer.bias.dtype == layer.base_dtype == torch.float16
    # bfloat16's rounding of the input may end at another FP8 value.
    assert relative(got, want) < 0.03 and layer.scale_input == torch.tensor(0.02)
    convert_fp8_linear(layer, BF16, ("",))
    assert layer(x).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_no_columns_give_the_bias(lead, bias, device):
    layer = nn.Linear(0, 5, bias=bias, device=device)
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(*lead, 0, device=device, dtype=BF16)
    want = layer.bfloat16()(x)
    layer.weight.data = layer.weight.data.to(E4M3)
    assert torch.equal(fp8_linear_forward(layer, BF16, x), want)
    for kind in (Fp8Linear, Fp8MatmulLinear):
        assert torch.equal(kind(layer.weight, None, layer.bias)(x), want)
    convert_fp8_linear(layer, BF16)
    assert torch.equal(layer(x), want)


def test_an_input_scale_of_one_was_never_measured():
    layer, x = layer_in(), torch.randn(9, 50) / 1000
    nn.init.zeros_(layer.bias)
    layer.scale_input = torch.ones(1)
    assert relative(fp8_linear_forward(layer, BF16, x), exact(layer, x)) < 0.06
    layer.scale_input = x.abs().max() / 448
    measured = fp8_linear_forward(layer, BF16, x)
    assert relative(measured, exact(layer, x)) < 0.06
    # A measured one is used: what it does not reach saturates.
    assert relative(fp8_linear_forward(layer, BF16, 2 * x), 2 * measured) > 0.05


@pytest.mark.parametrize("scales", [torch.rand(2), torch.rand(50)])
def test_scales_that_fit_nothing_are_refused(scales):
    layer = layer_in()
    layer.scale_weight = scales
    with pytest.raises(ValueError, match="fits no weight of 33 rows"):
        fp8_linear_forward(layer, BF16, torch.randn(2, 50))
    with pytest.raises(ValueError, match="fits no weight of 33 rows"):
        convert_fp8_linear(layer, BF16)


def test_several_scales_of_activations_are_refused():
    layer = layer_in()
    layer.scale_input = torch.ones(50)
    with pytest.raises(ValueError, match=r"shape \(50,\) must have one value: leave it out"):
        fp8_linear_forward(layer, BF16, torch.randn(2, 50))
    with pytest.raises(ValueError, match=r"shape \(50,\) must have one value: leave it out"):
        convert_fp8_linear(layer, BF16)


@pytest.mark.parametrize("input_scale", [None, 1.0, 0.02])
def test_full_graph_of_a_layer_whose_parameters_want_gradients(input_scale):
    torch._dynamo.reset()
    layer, x = layer_in(), torch.randn(2, 5, 50)
    if input_scale is not None:
        layer.scale_input = torch.tensor(input_scale)
    compiled = torch.compile(lambda x: fp8_linear_forward(layer, BF16, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fp8_linear_forward(layer, BF16, x))
    want = fp8_linear_forward(layer, BF16, x)
    convert_fp8_linear(layer, BF16)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_a_converted_layer_gives_the_base_precision(dtype):
    model = nn.Sequential(layer_in(), nn.GELU(), nn.Linear(33, 8, dtype=BF16))
    x = torch.randn(3, 50, dtype=dtype)
    want = model[2](model[1](fp8_linear_forward(model[0], BF16, x)))
    convert_fp8_linear(model, BF16)
    assert torch.equal(model(x), want)


def test_a_layer_alone_finds_its_scales():
    layer, x = layer_in(), torch.randn(3, 50)
    want = exact(layer, x, 4.0)
    convert_fp8_linear(layer, BF16, (), {"scale_weight": torch.tensor(4.0), "scale_input": torch.tensor(0.02)})
    assert relative(layer(x), want) < 0.06 and layer.scale_input == torch.tensor(0.02)


def test_scales_in_buffers_and_what_hangs_on_a_layer():
    layer, x = layer_in(), torch.randn(3, 50)
    layer.register_buffer("scale_weight", torch.full((33, 1), 4.0))
    layer.register_buffer("mine", torch.ones(2))
    layer.lora = nn.Linear(2, 2)
    want = exact(layer, x, 4.0)
    convert_fp8_linear(layer.eval(), BF16)
    assert relative(layer(x), want) < 0.06 and not layer.training
    assert torch.equal(layer.mine, torch.ones(2)) and isinstance(layer.lora, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "scale_weight", "lora.weight",
                                                             "lora.bias"]  # fmt: skip
    assert layer.in_features == 50 and layer.out_features == 33


class Named(nn.Linear):
    """As many libraries have it."""


class Doubling(nn.Linear):
    """With a forward of its own."""

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_layers_of_other_classes(caplog):
    model = nn.ModuleDict({"named": layer_in(kind=Named), "doubling": layer_in(kind=Doubling)})
    x = torch.randn(3, 50)
    want = model["doubling"](x)
    with caplog.at_level(logging.WARNING, "wanvideo"):
        convert_fp8_linear(model, BF16)
    assert isinstance(model["named"], Fp8MatmulLinear)
    assert torch.equal(model["doubling"](x), want) and "'doubling' has an FP8 weight but a forward" in caplog.text
