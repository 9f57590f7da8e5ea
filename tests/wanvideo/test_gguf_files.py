"""GGUF models: compressed in memory, right with LoRA, mixed with safetensors modules; what cannot be read is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from layouts import relative
from saved_models import save_gguf
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.gguf import GgufLinear
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
FP32 = LoadOptions(base_dtype=torch.float32)
# Types that the package can make; the others differ in their blocks alone, which tests/quantized/test_gguf.py compares.
FORMS = ("Q4_0", "Q5_1", "Q8_0", "MXFP4", "BF16")


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(1)
    inputs = ModelInputs(
        latents=torch.randn(1, model.config.in_dim, 2, 4, 4, generator=generator), timestep=torch.tensor([700.0]),
        text=(torch.randn(5, tiny.TEXT_DIM, generator=generator),),
    )  # fmt: skip
    with model.active() as transformer:
        return transformer(inputs)


@pytest.fixture(scope="module")
def t2v():
    return tiny.transformer(in_dim=16)


def rounded(model, form):
    """The values that a GGUF file of this type holds."""
    kind = GGMLQuantizationType[form]
    block = GGML_QUANT_SIZES[kind][0]
    tensors = {}
    for name, value in model.tensors.items():
        blocks = value.dim() == 2 and value.shape[1] % block == 0
        array = value.float().numpy()
        tensors[name] = torch.from_numpy(quants.dequantize(quants.quantize(array, kind), kind)) if blocks else value
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_any_type(t2v, form, tmp_path):
    save_gguf(t2v, tmp_path / "m.gguf", form=form)
    rounded(t2v, form).save(tmp_path / "m.safetensors", torch.float32)
    loaded, exact = (load_wan_model(tmp_path / f"m.{kind}", FP32, HOST, SYSTEMS) for kind in ("gguf", "safetensors"))
    assert relative(run(loaded), run(exact)) < 1e-5
    layers = [m for n, m in loaded.transformer.named_modules() if n.startswith("blocks.") and type(m) is GgufLinear]
    assert bool(layers) == (form != "BF16")


def test_memory_is_that_of_the_file(t2v, tmp_path):
    save_gguf(t2v, tmp_path / "m.gguf", form="Q4_0")
    model = load_wan_model(tmp_path / "m.gguf", FP32, HOST, SYSTEMS).transformer
    blocks = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith(".weight")}
    matrices = [p for n, p in blocks.items() if "norm" not in n]
    values = sum(v.numel() for n, v in t2v.tensors.items() if n.startswith("blocks.") and v.dim() == 2)
    assert matrices and sum(p.nbytes for p in matrices) == values * 18 // 32


@pytest.mark.parametrize("merge", [True, False])
def test_lora(t2v, merge, tmp_path):
    save_gguf(t2v, tmp_path / "m.gguf", form="Q8_0")
    rounded(t2v, "Q8_0").save(tmp_path / "m.safetensors", torch.float32)
    tiny.lora(t2v).save(tmp_path / "lora.safetensors", torch.float32)
    lora = LoraFile(path=tmp_path / "lora.safetensors", strength=0.7, merge=merge)
    options = replace(FP32, loras=(lora,))
    got, want, plain = (
        run(load_wan_model(tmp_path / name, chosen, HOST, SYSTEMS))
        for name, chosen in (("m.gguf", options), ("m.safetensors", options), ("m.safetensors", FP32))
    )
    # A merged weight is kept in bfloat16.
    assert relative(got, want) < (1e-2 if merge else 1e-5) and relative(got, want) < 0.3 * relative(plain, want)


def test_block_swap(t2v, tmp_path):
    save_gguf(t2v, tmp_path / "m.gguf", form="Q4_0")
    plain = load_wan_model(tmp_path / "m.gguf", FP32, HOST, SYSTEMS)
    options = replace(FP32, block_swap=BlockSwapArgs(blocks_to_swap=2))
    swapped = load_wan_model(tmp_path / "m.gguf", options, HOST, SYSTEMS)
    assert torch.equal(run(swapped), run(plain))


@pytest.mark.parametrize("main", ["gguf", "safetensors"])
def test_main_and_module_of_different_formats(main, tmp_path):
    model, module = tiny.image_to_video(clip_dim=tiny.CLIP_DIM), tiny.speech_module()
    other = "safetensors" if main == "gguf" else "gguf"
    for source, name, kind in ((model, "main", main), (module, "module", other)):
        if kind == "gguf":
            save_gguf(source, tmp_path / f"{name}.gguf")
        else:
            source.save(tmp_path / f"{name}.safetensors", torch.float32)
    options = replace(FP32, modules=(ModuleFile(tmp_path / f"module.{other}"),))
    loaded = load_wan_model(tmp_path / f"main.{main}", options, HOST, SYSTEMS)
    block = loaded.transformer.blocks[0]
    assert isinstance(block.self_attn.q, QuantizedLinear) == (main == "gguf")
    assert isinstance(block.audio_cross_attn.proj, QuantizedLinear) == (main != "gguf")


def test_inspect_names_the_types(t2v, tmp_path):
    save_gguf(t2v, tmp_path / "m.gguf", form="Q5_1")
    assert "GGUF Q5_1 (" in str(describe(tmp_path / "m.gguf", SYSTEMS))


def test_a_type_without_values_is_named(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_tensor("layer.weight", np.zeros((2, 40), np.uint8), raw_dtype=GGMLQuantizationType.Q8_1)
    for call in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, call)()
    with pytest.raises(ValueError, match=r"m\.gguf: tensor 'layer\.weight' has the GGUF type Q8_1, which.* IQ4_XS, "):
        open_checkpoint(tmp_path / "m.gguf")
