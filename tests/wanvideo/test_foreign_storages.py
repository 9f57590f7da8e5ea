"""Quantized files as ComfyUI, LightX2V and ModelOpt write them: read, kept, named by `inspect`, or refused."""

import json
from dataclasses import replace

import pytest
import torch
from comfy_kitchen import from_blocked, swap_nibbles
from layouts import relative
from safetensors.torch import load_file, save_file
from saved_models import quantizable, save_nvfp4
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.int8 import Int8Linear
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8Linear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear, Nvfp4MatmulLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import quantization
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
FP32 = LoadOptions(base_dtype=torch.float32)


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(1)
    inputs = ModelInputs(
        latents=torch.randn(1, 16, 2, 4, 4, generator=generator), timestep=torch.tensor([700.0]),
        text=(torch.randn(5, tiny.TEXT_DIM, generator=generator),),
    )  # fmt: skip
    with model.active() as transformer:
        return transformer(inputs)


@pytest.fixture(scope="module")
def t2v():
    return tiny.transformer(in_dim=16)


def mark(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def mxfp8(weight):
    layer = Mxfp8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.weight_scale, "comfy_quant": mark(format="mxfp8")}


def int8(weight):
    layer = Int8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.scale_weight, "comfy_quant": mark(format="int8_tensorwise")}


def int8_of_one_scale(weight):
    scale = weight.abs().max() / 127
    layer = Int8Linear((weight / scale).round().to(torch.int8), scale, None)
    return layer, {"weight_scale": scale, "comfy_quant": mark(format="int8_tensorwise")}


def int8_rotated(weight):
    layer = Int8Linear.quantize(weight, None, 64)
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    return layer, {"weight_scale": layer.scale_weight, "comfy_quant": mark(**settings)}


def int8_of_lightx2v(weight):
    layer = Int8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.scale_weight}


STORAGES = {
    "mxfp8": (mxfp8, "MXFP8"),
    "int8": (int8, "INT8"),
    "int8 of one scale": (int8_of_one_scale, "INT8"),
    "int8 rotated": (int8_rotated, "INT8 rotated"),
    "int8 of LightX2V": (int8_of_lightx2v, "INT8"),
}


def save(model, path, make):
    """The file, and the values that it holds."""
    tensors, exact = {}, {}
    for name, value in model.tensors.items():
        tensors[name] = exact[name] = value.float()
        if quantizable(name, value):
            layer, beside = make(value.float())
            tensors |= {name: layer.weight.detach()}
            tensors |= {f"{name.removesuffix('.weight')}.{leaf}": t.detach() for leaf, t in beside.items()}
            exact[name] = layer.expanded(torch.float32)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=model.metadata)
    return replace(model, tensors=exact)


@pytest.mark.parametrize("kind", STORAGES)
def test_marked_layers_keep_their_bytes(t2v, kind, tmp_path):
    make, name = STORAGES[kind]
    save(t2v, tmp_path / "m.safetensors", make).save(tmp_path / "exact.safetensors", torch.float32)
    loaded, exact = (load_wan_model(tmp_path / f"{file}.safetensors", FP32, HOST, SYSTEMS) for file in ("m", "exact"))
    assert relative(run(loaded), run(exact)) < 1e-5
    layer = loaded.transformer.blocks[0].ffn[0]
    assert type(layer) is (Mxfp8Linear if name == "MXFP8" else Int8Linear)
    stored = load_file(tmp_path / "m.safetensors")["blocks.0.ffn.0.weight"]
    assert torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))
    assert f"{name} (" in str(describe(tmp_path / "m.safetensors", SYSTEMS))
    # Read without a layer, as other models do.
    checkpoint, plain = (open_checkpoint(tmp_path / f"{file}.safetensors") for file in ("m", "exact"))
    for key in checkpoint.quantized:
        assert relative(checkpoint.tensor(key), plain.tensor(key)) < 1e-6
    assert set(checkpoint.shapes) == set(plain.shapes)


@pytest.mark.parametrize("kind", STORAGES)
def test_an_fp8_option_keeps_them_and_says_so(t2v, kind, tmp_path, caplog):
    save(t2v, tmp_path / "m.safetensors", STORAGES[kind][0])
    with caplog.at_level("INFO", "wanvideo"):
        model = load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization="fp8_e4m3fn"), HOST, SYSTEMS)
    assert isinstance(model.transformer.blocks[0].ffn[0], Int8Linear | Mxfp8Linear)
    assert "kept as it is" in caplog.text


def test_mxfp8_that_was_filled_up(tmp_path):
    weight = torch.randn(40, 70)
    layer = Mxfp8Linear.quantize(weight, None)
    tensors = {"layer.weight": layer.weight.detach(), "layer.weight_scale": layer.weight_scale.detach()}
    save_file(tensors | {"layer.comfy_quant": mark(format="mxfp8")}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.shapes["layer.weight"] == (64, 96)
    assert torch.equal(checkpoint.tensor("layer.weight")[:40, :70], layer.expanded(torch.float32))


def as_lightx2v(tensors):
    """ComfyUI's NVFP4 rewritten: codes in the other order, alpha and the activations' factor in place of two scales."""
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        layer = name.removesuffix(".comfy_quant")
        del tensors[name]
        tensors[f"{layer}.weight"] = swap_nibbles(tensors[f"{layer}.weight"])
        factor = 1 / tensors.pop(f"{layer}.input_scale")
        tensors[f"{layer}.input_global_scale"] = factor
        tensors[f"{layer}.alpha"] = tensors.pop(f"{layer}.weight_scale_2") / factor


def as_modelopt(tensors):
    """The same with the block scales in rows."""
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        layer = name.removesuffix(".comfy_quant")
        del tensors[name]
        rows, columns = tensors[f"{layer}.weight"].shape
        tensors[f"{layer}.weight"] = swap_nibbles(tensors[f"{layer}.weight"])
        scale = tensors[f"{layer}.weight_scale"].view(torch.uint8)
        in_rows = from_blocked(scale, num_rows=rows, num_cols=columns // 8).contiguous()
        tensors[f"{layer}.weight_scale"] = in_rows.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("rewrite", [as_lightx2v, as_modelopt])
def test_nvfp4_of_other_writers(t2v, rewrite, tmp_path, monkeypatch):
    save_nvfp4(t2v, tmp_path / "comfy.safetensors", input_scale=0.125)
    tensors = load_file(tmp_path / "comfy.safetensors")
    rewrite(tensors)
    save_file(tensors, tmp_path / "m.safetensors", metadata=t2v.metadata)
    assert "NVFP4 (" in str(describe(tmp_path / "m.safetensors", SYSTEMS))
    monkeypatch.setattr(quantization, "runs_fp4", lambda device: True)
    for option, kind in (("disabled", Nvfp4Linear), ("fp4_scaled_fast", Nvfp4MatmulLinear)):
        got, want = (
            load_wan_model(tmp_path / f"{name}.safetensors", replace(FP32, quantization=option), HOST, SYSTEMS)
            for name in ("m", "comfy")
        )
        ours, theirs = (model.transformer.blocks[1].cross_attn.o for model in (got, want))
        assert type(ours) is kind
        assert torch.equal(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.expanded(torch.float32), theirs.expanded(torch.float32), rtol=1e-6, atol=0)
        if kind is Nvfp4MatmulLinear:
            torch.testing.assert_close(ours.input_scale, theirs.input_scale)
            assert ours.input_scale == 0.125


ONE = {"layer.weight": torch.randint(0, 255, (32, 32), dtype=torch.uint8)}
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (ONE, r"quantized in a way .*U8, without"),
        (ONE | {"layer.comfy_quant": mark(format="convrot_w4a4")}, r"INT4 \(ConvRot W4A4\), which this version"),
        (ONE | {"layer.comfy_quant": mark(format="asym_w4a8_int8")}, "W4A8, which this version cannot read"),
        (ONE | {"layer.comfy_quant": mark(format="awq_w4a16")}, "AWQ W4A16, which"),
        (ONE | {"layer.comfy_quant": mark(format="mxfp8")}, r"'layer' is marked as MXFP8 but lacks its scales"),
        (
            ONE | {"layer.weight_scale": torch.ones(32, 8).to(E4M3), "layer.weight_scale_2": torch.ones(())},
            r"unmarked NVFP4 weight of \(32, 64\) is ModelOpt's, with F8_E4M3 scales of \(32, 4\)",
        ),
        (
            ONE | {"layer.weight_scale": torch.ones(32, 4).to(E4M3), "layer.weight_scale_2": torch.ones(2)},
            r"'layer\.weight_scale_2' has the shape \(2,\), but NVFP4 has one such value",
        ),
        (
            ONE | {"layer.weight_scale": torch.ones(32, 4).to(E4M3), "layer.weight_scale_2": torch.ones(()),
                   "layer.pre_quant_scale": torch.ones(64)},
            "scales each channel of its input",
        ),
        (
            {"layer.weight": torch.ones(8, 96, dtype=torch.int8), "layer.weight_scale": torch.ones(8, 1),
             "layer.comfy_quant": mark(format="int8_tensorwise", convrot=True, convrot_groupsize=64)},
            r"rotated in groups of 64 columns",
        ),
        (
            {"layer.weight": torch.ones(8, 96, dtype=torch.int8), "layer.weight_scale": torch.ones(8, 1),
             "layer.comfy_quant": mark(format="int8_tensorwise", convrot=True, convrot_groupsize="64")},
            "no whole number as convrot_groupsize",
        ),
        ({"layer.weight": torch.ones(8, 8, dtype=torch.int8)}, "I8, without"),
        ({"layer.weight": torch.ones(8, 8), "layer.comfy_quant": torch.ones(5)}, "is no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tensors, match, tmp_path):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(error.value) and "\n" not in str(error.value)
