"""Quantized files as ComfyUI, LightX2V and ModelOpt write them: read, kept, named by `inspect`, or refused."""

import json
from dataclasses import replace

import pytest
import torch
from comfy_kitchen import from_blocked, swap_nibbles
from foreign_files import STORAGES, int8, int8_rotated, mark, save
from layouts import relative
from safetensors.torch import load_file, save_file
from saved_models import save_nvfp4
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized import nvfp4
from wanvideo_wrapper.quantized.int8 import Int8Linear, Int8MatmulLinear
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8Linear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear, Nvfp4MatmulLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import quantization
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
E4M3 = torch.float8_e4m3fn
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


@pytest.mark.parametrize("kind", STORAGES)
def test_marked_layers_keep_their_bytes(t2v, kind, tmp_path, caplog):
    make, name, fast = STORAGES[kind]
    path = tmp_path / "m.safetensors"
    save(t2v, path, make).save(tmp_path / "exact.safetensors", torch.float32)
    loaded, exact = (load_wan_model(tmp_path / f"{file}.safetensors", FP32, HOST, SYSTEMS) for file in ("m", "exact"))
    want, stored = run(exact), load_file(path)["blocks.0.ffn.0.weight"]
    assert relative(run(loaded), want) < 1e-5
    with caplog.at_level("INFO", "wanvideo"):
        quick = load_wan_model(path, replace(FP32, quantization="fp8_e4m3fn_fast"), HOST, SYSTEMS)
    assert "kept as it is" in caplog.text
    assert relative(run(quick), want) < (0.2 if kind == "int4" else 0.02)
    for model, of in ((loaded, fast.__mro__[0] if name == "MXFP8" else fast.__mro__[1]), (quick, fast)):
        layer = model.transformer.blocks[0].ffn[0]
        assert type(layer) is of and torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))
    assert f"{name} (" in str(describe(path, SYSTEMS))
    # Read without a layer, as other models do.
    checkpoint, plain = (open_checkpoint(tmp_path / f"{file}.safetensors") for file in ("m", "exact"))
    for key in checkpoint.quantized:
        assert relative(checkpoint.tensor(key), plain.tensor(key)) < 1e-6
    assert set(checkpoint.shapes) == set(plain.shapes)


@pytest.mark.parametrize("kind", STORAGES)
def test_a_merged_lora_is_added_to_them(t2v, kind, tmp_path):
    save(t2v, tmp_path / "m.safetensors", STORAGES[kind][0])
    down, up = torch.randn(4, 128) * 0.1, torch.randn(256, 4) * 0.1
    pair = {"diffusion_model.blocks.0.ffn.0.lora_A.weight": down, "diffusion_model.blocks.0.ffn.0.lora_B.weight": up}
    save_file(pair, tmp_path / "l.safetensors")
    for option in ("disabled", "fp8_e4m3fn_fast"):
        lora = replace(FP32, quantization=option, loras=(LoraFile(path=tmp_path / "l.safetensors", strength=3.0),))
        base, changed = (
            load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS).transformer.blocks[0].ffn[0]
            for options in (replace(FP32, quantization=option), lora)
        )
        assert type(changed) is type(base) and changed.stored[0].shape == base.stored[0].shape
        want = base.expanded(torch.float64) + 3 * up.double() @ down.double()
        assert relative(changed.expanded(torch.float64), want) < (0.15 if "4" in kind else 0.04)


def test_integers_need_no_fp8_tensor_cores(t2v, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "runs_fp8", lambda device, dtype: "it is old")
    fast = replace(FP32, quantization="fp8_e4m3fn_fast")
    save(t2v, tmp_path / "m.safetensors", int8_rotated)
    model = load_wan_model(tmp_path / "m.safetensors", fast, HOST, SYSTEMS)
    assert type(model.transformer.blocks[0].ffn[0]) is Int8MatmulLinear
    save(t2v, tmp_path / "some.safetensors", lambda weight: int8(weight) if len(weight) == 128 else None)
    t2v.save(tmp_path / "none.safetensors", torch.bfloat16)
    for name in ("some", "none"):
        with pytest.raises(ValueError, match=r"which this machine cannot: it is old\. Choose 'fp8_e4m3fn',"):
            load_wan_model(tmp_path / f"{name}.safetensors", fast, HOST, SYSTEMS)


@pytest.mark.parametrize("marked", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_header_names_layers_with_a_prefix_or_without(prefix, marked, tmp_path):
    weight = torch.randn(8, 128)
    layer = Int8Linear.quantize(weight, None, 64)
    name, settings = "blocks.0.ffn.0", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    header = {"_quantization_metadata": json.dumps({"layers": {marked + name: settings}})}
    tensors = {f"{prefix}{name}.weight": layer.weight.detach(), f"{prefix}{name}.weight_scale": layer.scale_weight}
    save_file(tensors, tmp_path / "m.safetensors", metadata=header)
    assert relative(open_checkpoint(tmp_path / "m.safetensors").tensor(f"{name}.weight"), weight) < 0.02


W4A8 = {
    "layer.weight": torch.zeros(8, 128, dtype=torch.int8), "layer.weight_s_rel": torch.ones(8, 16).to(E4M3),
    "layer.weight_s_channel": torch.ones(8), "layer.comfy_quant": mark(format="asym_w4a8_int8"),
}  # fmt: skip
INT8 = {"layer.weight": torch.ones(8, 256, dtype=torch.int8), "layer.weight_scale": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"layer.weight_s_rel": None}, "marked as W4A8 but lacks its scales"),
        ({"layer.weight_s_channel": None}, "marked as W4A8 but lacks its scales"),
        ({"layer.weight_s_rel": torch.ones(8, 16).bfloat16()}, r"'layer.weight_s_rel' is BF16 \(8, 16\), but a W4A8"),
        ({"layer.weight_s_rel": torch.ones(16, 16).to(E4M3)}, r"of \(8, 256\) has F8_E4M3 \(8, 16\)"),
        ({"layer.weight_s_channel": torch.ones(16)}, r"has F32 \(8,\)"),
        ({"layer.weight_codebook": torch.ones(15)}, r"has F32 \(16,\)"),
        ({"layer.weight_correction": torch.ones(8, 16)}, r"has BF16 \(16, 8\)"),
        ({"layer.comfy_quant": mark(format="asym_w4a8_int8", group_size=32)}, "are no codes of 4 or 6 bits"),
        ({"layer.comfy_quant": mark(format="asym_w4a8_int8", convrot_groupsize=128)}, "groups of 128 columns"),
        ({"layer.comfy_quant": mark(format="asym_w4a8_int8", group_size=0)}, "no whole numbers as"),
        (
            {"layer.weight": torch.zeros(8, 192, dtype=torch.int8), "layer.weight_codebook": torch.ones(16)},
            "are no codes of 4 or 6 bits",
        ),
    ],
)  # fmt: skip
def test_w4a8_that_does_not_fit_is_named(tensors, match, tmp_path):
    save_file({k: v for k, v in (W4A8 | tensors).items() if v is not None}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("marks", "match"),
    [
        # One layer's mark got lost: its codes may be rotated, or halves of bytes.
        ({"other": {"format": "int8_tensorwise"}}, r"quantized in a way .*I8, without a comfy_quant mark"),
        ({"layer": {"format": "float8_e4m3fn"}}, "marked as FP8 but is stored as I8"),
        ({"layer": {"format": "nvfp4"}}, "marked as NVFP4 but is stored as I8"),
        ({"layer": {"format": "convrot_w4a4", "quant_group_size": 32}}, "asks for int4 in groups of 32"),
        ({"layer": {"format": "convrot_w4a4", "linear_dtype": "fp8"}}, "asks for fp8 in groups of 64"),
    ],
)
def test_marks_that_leave_a_doubt_are_refused(marks, match, tmp_path):
    header = {"_quantization_metadata": json.dumps({"layers": marks})}
    save_file(INT8 | {"other.weight": torch.ones(8, 256, dtype=torch.int8), "other.weight_scale": torch.ones(8, 1)},
              tmp_path / "m.safetensors", metadata=header)  # fmt: skip
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path / "m.safetensors")


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
    monkeypatch.setattr(nvfp4, "runs_fp4", lambda device: True)
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


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (ONE, r"quantized in a way .*U8, without"),
        (ONE | {"layer.comfy_quant": mark(format="convrot_w4a4")}, r"'layer' is marked as INT4 but is stored as U8"),
        (ONE | {"layer.comfy_quant": mark(format="asym_w4a8_int8")}, r"marked as W4A8 but is stored as U8"),
        (ONE | {"layer.comfy_quant": mark(format="awq_w4a16")}, "AWQ W4A16, which"),
        (ONE | {"layer.comfy_quant": mark(format="mxfp8")}, r"'layer' is marked as MXFP8 but is stored as U8"),
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
            "no whole numbers as convrot_groupsize",
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
