"""What files may say of their quantised weights: shapes of scales, marks, padding; what cannot be read is named."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from layouts import relative
from safetensors.torch import load_file, save_file
from saved_models import save_fp8
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.standalone_host import StandaloneHost
from wanvideo_wrapper.wanvideo.loading import LoadOptions, load_wan_model
from wanvideo_wrapper.wanvideo.modules import t5
from wanvideo_wrapper.wanvideo.modules.model import ModelInputs

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
        load_wan_model(tmp_path / f"{name}.safetensors", replace(FP32, quantization=option), HOST)
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
        load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option), HOST)


@pytest.mark.parametrize("quantization", t5.QUANTIZATIONS)
def test_a_text_encoder_with_a_scale_a_row(quantization, tmp_path):
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
    assert relative(*encoded) < 1e-5


@pytest.mark.parametrize("entry", [None, 3, ["nvfp4"]])
def test_a_header_that_says_nothing_of_a_layer_is_named(t2v, entry, tmp_path):
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    field = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": entry}})}
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors", metadata={**t2v.metadata, **field})
    message = r"m\.safetensors.*'_quantization_metadata, layer blocks\.0\.ffn\.0' is neither a format nor.*again\.$"
    with pytest.raises(ValueError, match=message):
        load_wan_model(tmp_path / "m.safetensors", FP32, HOST)


@pytest.mark.parametrize("option", ["fp8_e4m3fn_scaled", "fp8_e4m3fn_scaled_fast"])
@pytest.mark.parametrize("elements", [0, 1, 2])
def test_a_mark_of_two_elements_is_overruled_aloud(t2v, elements, option, tmp_path, caplog):
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    tensors = load_file(tmp_path / "m.safetensors")
    tensors["scaled_fp8"] = torch.zeros(elements).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "m.safetensors", metadata=t2v.metadata)
    with caplog.at_level(logging.INFO, "wanvideo"):
        model = load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option), HOST)
    fast = option.endswith("_fast")
    assert isinstance(model.transformer.blocks[0].ffn[0], Fp8MatmulLinear) == fast
    said = [m for m in caplog.messages if "m.safetensors asks for full-precision products" in m]
    assert len(said) == (fast and elements == 2) and all("multiplies in FP8 all the same" in m for m in said)
