"""VACE from files: merged in or as a module, with LoRA, quantization, swap and the layout contract."""

import pytest
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.vace.extension import Vace, VaceContext, VaceExtension
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
VACE = VaceExtension(blocks=2)
LATENTS, TEXT = torch.randn(1, 16, 3, 4, 4), torch.randn(5, tiny.TEXT_DIM)
PAYLOAD = Vace((VaceContext(latents=torch.randn(1, 96, 3, 4, 4)),)).window(whole_window(3))


@pytest.fixture(scope="module")
def merged():
    return tiny.transformer(in_dim=16, extensions=(VACE,))


@pytest.fixture(scope="module")
def folder(merged, tmp_path_factory):
    """merged, base, module and LoRA files in float32."""
    path = tmp_path_factory.mktemp("models")
    mine = {key: value for key, value in merged.tensors.items() if VACE.owns(key)}
    base = {key: value for key, value in merged.tensors.items() if key not in mine}
    for name, model in {
        "merged": merged, "base": tiny.Tiny(tensors=base, metadata=merged.metadata), "module": tiny.Tiny(tensors=mine),
        "lora": tiny.lora(tiny.Tiny(tensors=mine)),
    }.items():  # fmt: skip
        model.save(path / f"{name}.safetensors", torch.float32)
    return path


def load(folder, name, *modules, **options):
    files = tuple(ModuleFile(folder / f"{module}.safetensors", VaceExtension.file) for module in modules)
    options = {"base_dtype": torch.float32, **options}
    return load_wan_model(folder / f"{name}.safetensors", LoadOptions(modules=files, **options), HOST, SYSTEMS)


def inputs(*payloads):
    return ModelInputs(latents=LATENTS, timestep=torch.tensor([600.0]), text=(TEXT,), payloads=payloads)


@torch.no_grad()
def run(model, *payloads):
    with model.active() as transformer:
        return transformer(inputs(*(payloads or (PAYLOAD,))))


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def test_merged_and_as_a_module(folder, merged):
    config = load(folder, "merged").config
    plain = WanModel(config, (VACE,))
    plain.load_state_dict(merged.tensors)
    want = plain(inputs(PAYLOAD))
    for model in (load(folder, "merged"), load(folder, "base", "module")):
        assert model.report.unused == ()
        assert relative(run(model), want) < 1e-6
    assert relative(plain(inputs()), want) > 1e-3


def test_files_that_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match="VACE embeds need a model with vace_blocks"):
        model = load(folder, "base")
        assert not model.transformer.reads(PAYLOAD)
        run(model)
    with pytest.raises(ValueError, match=r"module\.safetensors is a VACE module, not a Wan transformer.*VACE Module"):
        load(folder, "module")
    with pytest.raises(ValueError, match=r"base\.safetensors is a Wan transformer, not a VACE module"):
        load(folder, "merged", "base")
    with pytest.raises(ValueError, match=r"lora\.safetensors is a LoRA, not a VACE module"):
        load(folder, "base", "lora")


def test_a_lora_changes_vace_blocks(folder):
    plain = run(load(folder, "merged"))
    into = load(folder, "merged", loras=(LoraFile(path=folder / "lora.safetensors", strength=10),))
    beside = load(folder, "merged", loras=(LoraFile(path=folder / "lora.safetensors", strength=10, merge=False),))
    assert relative(run(into), plain) > 1e-3
    assert relative(run(beside), run(into)) < 1e-5


@pytest.mark.parametrize(("quantization", "error"), [("fp8_e4m3fn", 0.1), ("fp8_e4m3fn_fast", 0.2)])
def test_quantized(folder, quantization, error):
    model = load(folder, "merged", quantization=quantization)
    block = model.transformer.vace_blocks[0]
    for layer in (block.before_proj, block.after_proj, block.self_attn.q, block.cross_attn.k, block.ffn[2]):
        assert isinstance(layer, QuantizedLinear)
    assert model.transformer.vace_patch_embedding.weight.dtype == torch.float32
    assert 0 < relative(run(model), run(load(folder, "merged"))) < error


def test_every_linear_layer_gets_dense_input(folder):
    """Whatever memory the context comes from; kernels of others read it with no operator between."""
    model = load(folder, "merged")
    seen = []
    for name, layer in model.transformer.vace_blocks.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0].is_contiguous())))
    wide = torch.randn(1, 96, 4, 3, 4).permute(0, 1, 3, 4, 2)
    run(model, Vace((VaceContext(latents=wide),)))
    assert len(seen) == 23 and all(contiguous for _, contiguous in seen)
