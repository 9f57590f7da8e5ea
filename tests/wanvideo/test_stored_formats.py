"""What files may say of their quantized weights: shapes of scales, marks, padding; what cannot be read is named."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from layouts import relative
from safetensors.torch import load_file, save_file
from saved_models import quantizable, save_fp8, save_nvfp4
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.quantized.nvfp4 import quantize_nvfp4, values_of
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.assign import assign
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules import t5
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


def save_with_scales(model, path, scale_of):
    """Scaled FP8 where `scale_of` makes the stored scale from one value and the number of rows."""
    save_fp8(model, path, scaled=True)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(".scale_weight")]:
        rows = tensors[name.replace("scale_weight", "weight")].shape[0]
        tensors[name] = scale_of(tensors[name], rows).contiguous()
    save_file(tensors, path, metadata=model.metadata)


@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)])
def test_scales_of_rows_in_any_shape(t2v, shape, option, tmp_path):
    save_fp8(t2v, tmp_path / "one.safetensors", scaled=True)
    save_with_scales(t2v, tmp_path / "rows.safetensors", lambda scale, rows: scale.expand(rows).reshape(shape))
    one, rows = (
        load_wan_model(tmp_path / f"{name}.safetensors", replace(FP32, quantization=option), HOST, SYSTEMS)
        for name in ("one", "rows")
    )
    assert torch.equal(run(rows), run(one))


# 4096 values for the 4096 rows of a weight may be blocks of 64 x 64 all the same.
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
@pytest.mark.parametrize("shape", ["2, 2", "2, 64"])
def test_scales_of_blocks_are_named(t2v, shape, option, tmp_path):
    sizes = tuple(map(int, shape.split(", ")))
    save_with_scales(t2v, tmp_path / "m.safetensors", lambda scale, rows: torch.ones(sizes))
    message = rf"m\.safetensors: the scale of 'blocks\.0\..*\.weight' has the shape \({shape}\), but only one value"
    with pytest.raises(ValueError, match=message):
        load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option), HOST, SYSTEMS)


@pytest.mark.parametrize("quantization", t5.QUANTIZATIONS)
def test_a_text_encoder_with_a_scale_a_row(quantization, tmp_path, caplog):
    """Its FP8 stays FP8 under either option, but for layers that transformers could not use."""
    caplog.set_level(logging.INFO, "wanvideo")
    exact, tensors = {}, {}
    for name, value in tiny.text_encoder(wan_names=False).tensors.items():
        exact[name] = tensors[name] = value
        if value.dim() == 2 and "block" in name and "bias" not in name:
            scale = value.abs().amax(1) / 448
            tensors[name] = (value / scale[:, None]).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale")] = scale.reshape(1, -1)
            exact[name] = tensors[name].float() * scale[:, None]
    encoded = []
    for kind, saved in (("scaled", tensors), ("exact", exact)):
        save_file(saved, tmp_path / f"{kind}.safetensors")
        chosen = quantization if kind == "scaled" else "disabled"
        encoder = t5.load_text_encoder(
            tmp_path / f"{kind}.safetensors", dtype=torch.float32, quantization=chosen, host=HOST
        )
        encoded += encoder.encode(["a red panda"])
        if kind == "scaled":
            layers = {n: type(m) for n, m in encoder._model.named_modules() if isinstance(m, torch.nn.Linear)}
            assert layers == {n: torch.nn.Linear if n.endswith(".wo") else Fp8Linear for n in layers}
            outputs, stored = sum(n.endswith(".wo") for n in layers), len(layers)
    assert relative(*encoded) < 1e-5
    (said,) = [m for m in caplog.messages if "expanded" in m]
    assert re.fullmatch(
        rf"scaled\.safetensors \(0\.0 GB\): {outputs} of its {stored} weights in F8_E4M3 are expanded, "
        r"so that the text encoder takes 0\.0 GB\.", said,
    )  # fmt: skip


@pytest.mark.parametrize("entry", [None, 3, ["nvfp4"]])
def test_a_header_that_says_nothing_of_a_layer_is_named(t2v, entry, tmp_path):
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    field = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": entry}})}
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors", metadata={**t2v.metadata, **field})
    message = r"m\.safetensors.*'_quantization_metadata, layer blocks\.0\.ffn\.0' is neither a format nor.*again\.$"
    with pytest.raises(ValueError, match=message):
        load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)


@pytest.mark.parametrize("option", ["fp8_e4m3fn_scaled", "fp8_e4m3fn_scaled_fast"])
@pytest.mark.parametrize("elements", [0, 1, 2])
def test_a_mark_of_two_elements_is_overruled_aloud(t2v, elements, option, tmp_path, caplog):
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    tensors = load_file(tmp_path / "m.safetensors")
    tensors["scaled_fp8"] = torch.zeros(elements).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "m.safetensors", metadata=t2v.metadata)
    with caplog.at_level(logging.INFO, "wanvideo"):
        model = load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option), HOST, SYSTEMS)
    fast = option.endswith("_fast")
    assert isinstance(model.transformer.blocks[0].ffn[0], Fp8MatmulLinear) == fast
    said = [m for m in caplog.messages if "m.safetensors asks for full-precision products" in m]
    assert len(said) == (fast and elements == 2) and all("multiplies in FP8 all the same" in m for m in said)


def narrower(model, width):
    """The model with feed-forward layers of `width` channels."""
    cut = {"ffn.0.weight": slice(width), "ffn.0.bias": slice(width), "ffn.2.weight": (slice(None), slice(width))}
    parts = {k: next((at for end, at in cut.items() if k.endswith(end)), ...) for k in model.tensors}
    return replace(model, tensors={k: v[parts[k]].clone() for k, v in model.tensors.items()})


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("option", "tolerance"), [("disabled", 1e-5), ("fp4_scaled", 1e-5), ("fp4_scaled_fast", 0.06)])
@pytest.mark.parametrize("width", [208, 200])
def test_nvfp4_that_was_filled_up_to_whole_blocks(t2v, width, option, tolerance, merged, tmp_path):
    model = narrower(t2v, width)
    save_nvfp4(model, tmp_path / "filled.safetensors")
    assert load_file(tmp_path / "filled.safetensors")["blocks.0.ffn.2.weight"].shape == (128, 224 / 2)
    exact = {
        k: values_of(quantize_nvfp4(v))[: v.shape[0], : v.shape[1]] if quantizable(k, v) else v.bfloat16().float()
        for k, v in model.tensors.items()
    }
    replace(model, tensors=exact).save(tmp_path / "exact.safetensors", torch.float32)
    tiny.lora(model).save(tmp_path / "lora.safetensors", torch.float32)
    options = replace(FP32, loras=(LoraFile(path=tmp_path / "lora.safetensors", strength=0.5),) if merged else ())
    loaded = load_wan_model(tmp_path / "filled.safetensors", replace(options, quantization=option), HOST, SYSTEMS)
    assert loaded.transformer.blocks[0].ffn[2].in_features == width == loaded.config.ffn_dim
    want = run(load_wan_model(tmp_path / "exact.safetensors", options, HOST, SYSTEMS))
    assert relative(run(loaded), want) < (0.2 if merged else tolerance)


def save_one_nvfp4(weight, path):
    q, mark = quantize_nvfp4(weight), torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    scales = {"layer.weight_scale": q.block_scale, "layer.weight_scale_2": q.scale, "layer.comfy_quant": mark}
    save_file({"layer.weight": q.codes, **scales}, path)
    return values_of(q)


@pytest.mark.parametrize(("wanted", "fits"), [((24, 40), True), ((32, 64), True), ((16, 40), False), ((24, 32), False)])
def test_nvfp4_of_a_plain_layer_loses_what_filled_it_up(wanted, fits, tmp_path):
    values = save_one_nvfp4(torch.randn(24, 40), tmp_path / "m.safetensors")
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(*wanted[::-1], bias=False, device="meta")
    checkpoint, names = open_checkpoint(tmp_path / "m.safetensors"), {"layer.weight": "layer.weight"}
    if not fits:
        with pytest.raises(ValueError, match=r"'layer\.weight' has the shape \(32, 64\) where a test has"):
            assign(model, checkpoint, names, dtype=torch.float32, what="test")
        return
    assign(model, checkpoint, names, dtype=torch.float32, what="test")
    torch.testing.assert_close(model.layer.weight, torch.nn.Parameter(values[: wanted[0], : wanted[1]]))
