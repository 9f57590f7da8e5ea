"""A loaded model computes what its file says: formats, namings, LoRA, block swap, compilation."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from layouts import save_in_order
from safetensors.torch import load_file, save_file
from saved_models import save_fp8
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, quantize_rows
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model, with_loras
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
FP32 = LoadOptions(base_dtype=torch.float32)


def inputs(in_dim=16):
    generator = torch.Generator().manual_seed(1)
    return ModelInputs(
        latents=torch.randn(1, in_dim, 2, 4, 4, generator=generator), timestep=torch.tensor([700.0]),
        text=(torch.randn(5, tiny.TEXT_DIM, generator=generator),),
    )  # fmt: skip


def on_cuda(given):
    text = tuple(t.cuda() for t in given.text)
    return replace(given, latents=given.latents.cuda(), timestep=given.timestep.cuda(), text=text)


@torch.no_grad()
def run(model, step=None):
    with model.active() as transformer:
        if step is not None:
            model.set_step(step)
        return transformer(inputs(model.config.in_dim))


@torch.no_grad()
def reference(tensors, in_dim=16):
    """The model with these tensors, assigned without the loader."""
    config = WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=3, in_dim=in_dim, text_dim=tiny.TEXT_DIM)
    model = WanModel(config)
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    return model(inputs(in_dim))


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def t2v():
    return tiny.transformer(in_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_precisions(t2v, dtype, tmp_path):
    t2v.save(tmp_path / "model.safetensors", dtype)
    model = load_wan_model(tmp_path / "model.safetensors", FP32, HOST, SYSTEMS)
    want = reference({k: v.to(dtype) for k, v in t2v.tensors.items()})
    assert relative(run(model), want) < 1e-6
    assert model.report.unused == ()


def test_odd_tensors_in_front_leave_the_rest_aligned(t2v, tmp_path):
    # A tensor of odd length shifts all that follow it in the file.
    tensors = {"aaa_odd": torch.ones(3, dtype=torch.uint8), **t2v.tensors}
    save_in_order(tmp_path / "m.safetensors", tensors, t2v.metadata)
    model = load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    assert all(p.data_ptr() % 16 == 0 for p in model.transformer.parameters())
    assert relative(run(model), reference(t2v.tensors)) < 1e-6
    assert model.report.unused == ("aaa_odd",)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn", "fp8_e4m3fn_scaled"])
def test_fp8_files_keep_their_bytes(t2v, scaled, option, tmp_path):
    path = tmp_path / "model.safetensors"
    save_fp8(t2v, path, scaled=scaled)
    options = replace(FP32, quantization=option)
    if option.endswith("scaled") and not scaled:
        with pytest.raises(ValueError, match="has none: choose 'fp8_e4m3fn'"):
            load_wan_model(path, options, HOST, SYSTEMS)
        return
    model = load_wan_model(path, options, HOST, SYSTEMS)
    assert isinstance(model.transformer.blocks[0].self_attn.q, Fp8Linear)
    expected = {}
    stored = load_file(path)
    for name in t2v.tensors:
        scale = stored.get(name.replace(".weight", ".scale_weight"), torch.ones(1))
        expected[name] = stored[name].float() * (scale if name.endswith(".weight") else 1)
    assert relative(run(model), reference(expected)) < 1e-5


def test_fp8_made_at_load_has_a_scale_a_row(t2v, tmp_path):
    t2v.save(tmp_path / "model.safetensors", torch.float32)
    model = load_wan_model(tmp_path / "model.safetensors", replace(FP32, quantization="fp8_e4m3fn"), HOST, SYSTEMS)
    layer = model.transformer.blocks[1].ffn[0]
    weight, scale = quantize_rows(t2v.tensors["blocks.1.ffn.0.weight"], torch.float8_e4m3fn)
    assert torch.equal(layer.weight.float(), weight.float()) and torch.equal(layer.scale_weight, scale)
    assert 0 < relative(run(model), reference(t2v.tensors)) < 0.05


def test_missing_and_mismatched_tensors_are_named(t2v, tmp_path):
    path = tmp_path / "model.safetensors"
    rest = {k: v for k, v in t2v.tensors.items() if k != "blocks.1.ffn.2.bias"}
    replace(t2v, tensors=rest).save(path)
    with pytest.raises(ValueError, match=r"lacks 1 of .*'blocks\.1\.ffn\.2\.bias'"):
        load_wan_model(path, FP32, HOST, SYSTEMS)
    replace(t2v, tensors={**t2v.tensors, "blocks.1.ffn.2.bias": torch.randn(7)}).save(path)
    with pytest.raises(ValueError, match=r"'blocks\.1\.ffn\.2\.bias' has the shape \(7,\)"):
        load_wan_model(path, FP32, HOST, SYSTEMS)


@torch.no_grad()
def test_diffusers_names(tmp_path):
    torch.manual_seed(2)
    other = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=tiny.TEXT_DIM,
        freq_dim=256, ffn_dim=96, num_layers=2,
    ).eval()  # fmt: skip
    save_file(other.state_dict(), tmp_path / "d.safetensors", metadata={"wanvideo.num_heads": "2"})
    model = load_wan_model(tmp_path / "d.safetensors", FP32, HOST, SYSTEMS)
    given = inputs()
    text = torch.nn.functional.pad(given.text[0], (0, 0, 0, 512 - 5))[None]
    want = other(given.latents, given.timestep, text, return_dict=False)[0]
    assert relative(run(model), want) < 1e-5


def lora_files(t2v, tmp_path, **options):
    tiny.lora(t2v).save(tmp_path / "lora.safetensors", torch.float32)
    return (LoraFile(path=tmp_path / "lora.safetensors", **options),)


def merged_by_hand(t2v, lora, strength):
    tensors = {k: v.double() for k, v in t2v.tensors.items()}
    for key, down in lora.tensors.items():
        if key.endswith("lora_A.weight"):
            up = lora.tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("diffusion_model.").replace("lora_A.weight", "weight")
            tensors[name] = tensors[name] + strength * up.double() @ down.double()
    return tensors


def test_lora_merged_and_beside_equal_the_formula(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    want = reference(merged_by_hand(t2v, tiny.lora(t2v), 0.7))
    merged = load_wan_model(
        tmp_path / "m.safetensors", replace(FP32, loras=lora_files(t2v, tmp_path, strength=0.7)), HOST, SYSTEMS
    )
    assert relative(run(merged), want) < 1e-5
    plain = load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    beside = with_loras(plain, lora_files(t2v, tmp_path, strength=0.7, merge=False))
    assert relative(run(beside), want) < 1e-5
    assert relative(run(plain), reference(t2v.tensors)) < 1e-6


def test_lora_strength_by_step_and_by_block(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    plain = load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    steps = with_loras(plain, lora_files(t2v, tmp_path, strength=(0.0, 0.7), merge=False))
    assert relative(run(steps, step=0), reference(t2v.tensors)) < 1e-6
    assert relative(run(steps, step=5), reference(merged_by_hand(t2v, tiny.lora(t2v), 0.7))) < 1e-5
    only = with_loras(plain, lora_files(t2v, tmp_path, blocks=("blocks.1.",), merge=False))
    lora = tiny.lora(t2v)
    some = replace(lora, tensors={k: v for k, v in lora.tensors.items() if ".blocks.1." in k})
    assert relative(run(only), reference(merged_by_hand(t2v, some, 1.0))) < 1e-5
    with pytest.raises(ValueError, match="merge_loras"):
        with_loras(plain, lora_files(t2v, tmp_path))


def test_lora_on_fp8(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    options = replace(FP32, quantization="fp8_e4m3fn")
    base = load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    beside = with_loras(base, lora_files(t2v, tmp_path, strength=3.0, merge=False))
    merged = load_wan_model(
        tmp_path / "m.safetensors", replace(options, loras=lora_files(t2v, tmp_path, strength=3.0)), HOST, SYSTEMS
    )
    want = reference(merged_by_hand(t2v, tiny.lora(t2v), 3.0))
    for model in (beside, merged):
        assert relative(run(model), want) < 0.06
        assert relative(run(model), run(base)) > relative(run(model), want)


DIFFERENCES = {
    "blocks.0.ffn.0": ("diff_b",), "blocks.1.self_attn.q": ("diff", "diff_b"), "blocks.1.self_attn.norm_q": ("diff",),
    "blocks.2.norm3": ("diff", "diff_b"), "blocks.2": ("diff_m",), "head": ("diff_m",), "patch_embedding": ("diff_b",),
    "time_projection.1": ("diff", "diff_b"),
}  # fmt: skip
TARGETS = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}


def difference_lora(t2v, path, strength):
    """A LoRA of whole differences at `path`, beside products for the patch embedding; the tensors it makes."""
    changed, saved = {k: v.double() for k, v in t2v.tensors.items()}, {}
    for layer, parts in DIFFERENCES.items():
        for part in parts:
            name = layer + TARGETS[part]
            saved[f"diffusion_model.{layer}.{part}"] = difference = torch.randn(changed[name].shape) * 0.1
            changed[name] = changed[name] + strength * difference
    weight = changed["patch_embedding.weight"]
    down, up = torch.randn(4, *weight.shape[1:]) * 0.1, torch.randn(weight.shape[0], 4, 1, 1, 1) * 0.1
    saved["diffusion_model.patch_embedding.lora_A.weight"] = down
    saved["diffusion_model.patch_embedding.lora_B.weight"] = up
    product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
    changed["patch_embedding.weight"] = weight + strength * product
    save_file(saved, path)
    return changed


@pytest.mark.parametrize("swapped", [0, 2])
def test_lora_of_differences(t2v, swapped, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    want = reference(difference_lora(t2v, tmp_path / "d.safetensors", 0.7))
    options = replace(FP32, block_swap=BlockSwapArgs(blocks_to_swap=swapped))
    merge, beside = (LoraFile(path=tmp_path / "d.safetensors", strength=0.7, merge=m) for m in (True, False))
    merged = load_wan_model(tmp_path / "m.safetensors", replace(options, loras=(merge,)), HOST, SYSTEMS)
    assert relative(run(merged), want) < 1e-5
    plain = load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    assert relative(run(with_loras(plain, (beside,))), want) < 1e-5
    steps = with_loras(plain, (replace(beside, strength=(0.0, 0.7)),))
    assert relative(run(steps, step=0), reference(t2v.tensors)) < 1e-6
    assert relative(run(steps, step=1), want) < 1e-5
    assert relative(run(plain), reference(t2v.tensors)) < 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("ahead", [0, 1])
def test_lora_of_differences_under_block_swap(t2v, ahead, tmp_path, monkeypatch):
    # The reference is the CPU's; TF32 in the patch embedding's convolution would differ in the fourth digit.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    want = reference(difference_lora(t2v, tmp_path / "d.safetensors", 0.7))
    swap = BlockSwapArgs(blocks_to_swap=2, embeddings=("text_embedding",), prefetch_blocks=ahead)
    host = StandaloneHost(device="cuda")
    plain = load_wan_model(tmp_path / "m.safetensors", replace(FP32, block_swap=swap), host, SYSTEMS)
    lora = LoraFile(path=tmp_path / "d.safetensors", strength=(0.0, 0.7), merge=False)
    with with_loras(plain, (lora,)).active() as transformer:
        assert relative(transformer(on_cuda(inputs())).cpu(), reference(t2v.tensors)) < 1e-4
    steps = with_loras(plain, (lora,))
    with steps.active() as transformer:
        steps.set_step(1)
        assert relative(transformer(on_cuda(inputs())).cpu(), want) < 1e-4
    with plain.active() as transformer:
        assert relative(transformer(on_cuda(inputs())).cpu(), reference(t2v.tensors)) < 1e-4


@pytest.mark.parametrize("fp8", [False, True])
def test_lora_beside_compiled_blocks(t2v, fp8, tmp_path):
    torch._dynamo.reset()
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    difference_lora(t2v, tmp_path / "d.safetensors", 0.7)
    options = replace(FP32, quantization="fp8_e4m3fn" if fp8 else "disabled")
    plain = load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    files = (
        *lora_files(t2v, tmp_path, strength=0.7, merge=False),
        LoraFile(path=tmp_path / "d.safetensors", strength=0.7, merge=False),
    )
    eager = with_loras(plain, files)
    compiled = replace(eager, options=replace(options, compile=CompileArgs(backend="eager", fullgraph=True)))
    assert relative(run(compiled), run(eager)) < 1e-6 < relative(run(eager), run(plain))


def test_lora_of_differences_on_fp8(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    difference_lora(t2v, tmp_path / "d.safetensors", 0.7)
    options = replace(FP32, quantization="fp8_e4m3fn")
    plain = load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    merged, beside = (LoraFile(path=tmp_path / "d.safetensors", strength=0.7, merge=m) for m in (True, False))
    want = run(with_loras(plain, (beside,)))
    got = run(load_wan_model(tmp_path / "m.safetensors", replace(options, loras=(merged,)), HOST, SYSTEMS))
    assert relative(got, want) < 0.02 < relative(run(plain), want)


def test_lora_of_another_size_is_named(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    options = replace(FP32, loras=(LoraFile(path=tmp_path / "d.safetensors"),))
    q = "diffusion_model.blocks.0.self_attn.q"
    for tensors in (
        {f"{q}.lora_A.weight": torch.randn(4, 64), f"{q}.lora_B.weight": torch.randn(128, 4)},
        {f"{q}.lora_A.weight": torch.randn(4, 128), f"{q}.lora_B.weight": torch.randn(64, 4)},
        {f"{q}.diff": torch.randn(128, 64)},
    ):
        save_file(tensors, tmp_path / "d.safetensors")
        with pytest.raises(ValueError, match=r"another size of model: its change of 'blocks\.0\.self_attn\.q'"):
            load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    save_file({"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.randn(128)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="has none"):
        load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)


def test_lora_for_another_model_is_named(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    save_file({"transformer.single.lora_A.weight": torch.randn(4, 8), "transformer.single.lora_B.weight":
               torch.randn(8, 4)}, tmp_path / "lora.safetensors")  # fmt: skip
    options = replace(FP32, loras=(LoraFile(path=tmp_path / "lora.safetensors"),))
    with pytest.raises(ValueError, match="fits no layer"):
        load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)


def test_block_swap_rests_where_all_is_one_device(t2v, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    plain = load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    swapped = replace(plain, block_swap=BlockSwapArgs(blocks_to_swap=2, embeddings=("text_embedding",)))
    before = [parameter.data_ptr() for parameter in plain.transformer.parameters()]
    assert torch.equal(run(swapped), run(plain))
    assert [parameter.data_ptr() for parameter in plain.transformer.parameters()] == before


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize(("blocks", "ahead", "debug"), list(itertools.product([0, 1, 3, 40], [0, 1, 2], [False, True])))
def test_block_swap_changes_nothing(t2v, blocks, ahead, debug, tmp_path):
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    host = StandaloneHost(device="cuda")
    model = load_wan_model(tmp_path / "m.safetensors", FP32, host, SYSTEMS)
    given = on_cuda(inputs())
    with model.active() as transformer:
        want = transformer(given)
    swap = BlockSwapArgs(
        blocks_to_swap=blocks, embeddings=("text_embedding", "img_emb") if debug else (), use_non_blocking=True,
        prefetch_blocks=ahead, block_swap_debug=debug,
    )  # fmt: skip
    swapped = replace(model, block_swap=swap)
    with swapped.active() as transformer:
        waiting = [i for i, block in enumerate(transformer.blocks) if not next(block.parameters()).is_cuda]
        assert len(waiting) == min(blocks, 3)
        assert torch.equal(transformer(given), want)
        assert not any(next(transformer.blocks[i].parameters()).is_cuda for i in waiting)


def test_compiled_blocks_equal_eager_and_are_plain_afterwards(t2v, tmp_path):
    torch._dynamo.reset()
    t2v.save(tmp_path / "m.safetensors", torch.float32)
    plain = load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    want, keys = run(plain), list(plain.transformer.state_dict())
    args = CompileArgs(backend="eager", fullgraph=True)
    compiled = replace(plain, options=replace(FP32, compile=args))
    assert relative(run(compiled), want) < 1e-6
    assert list(plain.transformer.state_dict()) == keys
    assert all(block._compiled_call_impl is None for block in plain.transformer.blocks)
