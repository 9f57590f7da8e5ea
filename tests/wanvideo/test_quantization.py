"""The `quantization` option against every kind of file: what is loaded, what is refused, what the model computes."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from layouts import relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import quantizable, save_comfy_fp8, save_fp8, save_gguf, save_nvfp4
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fp8_optimization import keeps_precision
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.kernels import holds, op_name
from wanvideo_wrapper.multitalk.extension import AudioWindow
from wanvideo_wrapper.quantized.fp8 import FP8_DTYPES, Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.quantized.nvfp4 import (
    Nvfp4Fp8Linear,
    Nvfp4Linear,
    Nvfp4MatmulLinear,
    quantize_nvfp4,
    runs_fp4,
    values_of,
)
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import quantization
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model, with_loras
from wanvideo_wrapper.wanvideo.lora import LoraFile, read_lora
from wanvideo_wrapper.wanvideo.quantization import QUANTIZATIONS
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
FP32 = LoadOptions(base_dtype=torch.float32)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]
FAST4 = Nvfp4MatmulLinear if torch.cuda.is_available() and runs_fp4(torch.device("cuda")) else Nvfp4Fp8Linear
# Option -> layer made of a bf16 file, and how far the model's output may be from the file's. The tiny model has
# random weights, no outliers, and three blocks; a GPU's convolution of the patches rounds to TF32.
FROM_BF16 = {
    "disabled": (torch.nn.Linear, 1e-3),
    "fp8_e4m3fn": (Fp8Linear, 0.05), "fp8_e4m3fn_fast": (Fp8MatmulLinear, 0.06),
    "fp8_e5m2": (Fp8Linear, 0.08), "fp8_e5m2_fast": (Fp8MatmulLinear, 0.08),
    "fp4_experimental": (Nvfp4Linear, 0.15), "fp4_scaled": (Nvfp4Linear, 0.15), "fp4_scaled_fast": (FAST4, 0.2),
}  # fmt: skip
OPTIONS = list(QUANTIZATIONS)
PRODUCT = op_name("quantized_product.default").replace("::", ".")


def inputs(in_dim=16, device="cpu", payloads=()):
    generator = torch.Generator().manual_seed(1)
    return ModelInputs(
        latents=torch.randn(1, in_dim, 2, 4, 4, generator=generator).to(device),
        timestep=torch.tensor([700.0], device=device),
        text=(torch.randn(5, tiny.TEXT_DIM, generator=generator).to(device),), payloads=payloads,
    )  # fmt: skip


@torch.no_grad()
def run(model, device="cpu", payloads=()):
    with model.active() as transformer:
        return transformer(inputs(model.config.in_dim, device, payloads)).cpu()


@pytest.fixture(scope="module")
def t2v():
    return tiny.transformer(in_dim=16)


@pytest.fixture(scope="module")
def plain(t2v, tmp_path_factory):
    """A bf16 file and what it computes."""
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    t2v.save(path, torch.bfloat16)
    return path, run(load_wan_model(path, FP32, HOST, SYSTEMS))


def kinds(model):
    """Classes of the layers that the options concern."""
    return {
        type(layer)
        for name, layer in model.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks.") and not keeps_precision(name)
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", FROM_BF16)
def test_from_bf16(plain, option, device):
    path, want = plain
    kind, tolerance = FROM_BF16[option]
    model = load_wan_model(path, replace(FP32, quantization=option), StandaloneHost(device=device), SYSTEMS)
    assert kinds(model) == {kind}
    kept = [m for n, m in model.transformer.named_modules() if keeps_precision(n) or not n.startswith("blocks.")]
    assert not any(isinstance(module, QuantizedLinear) for module in kept)
    assert relative(run(model, device), want) < tolerance


@pytest.mark.parametrize("option", [o for o in OPTIONS if "scaled" in o and o.startswith("fp8")])
def test_scaled_options_need_scales(plain, option):
    with pytest.raises(ValueError, match=f"has none: choose '{option.replace('_scaled', '')}' or 'disabled'"):
        load_wan_model(plain[0], replace(FP32, quantization=option), HOST, SYSTEMS)


@pytest.mark.parametrize("option", OPTIONS)
def test_scaled_fp8_file(t2v, plain, option, tmp_path, caplog):
    path = tmp_path / "scaled.safetensors"
    save_fp8(t2v, path, scaled=True)
    with caplog.at_level(logging.INFO, "wanvideo"):
        model = load_wan_model(path, replace(FP32, quantization=option), HOST, SYSTEMS)
    row = QUANTIZATIONS[option]
    if row.storage == "nvfp4":
        assert kinds(model) == {Nvfp4Fp8Linear if row.fast else Nvfp4Linear} and "from FP8" in caplog.text
    else:
        assert kinds(model) == {Fp8MatmulLinear if row.fast else Fp8Linear}
        stored = load_file(path)["blocks.0.ffn.0.weight"]
        assert torch.equal(model.transformer.blocks[0].ffn[0].weight.view(torch.uint8), stored.view(torch.uint8))
        assert ("its scaled form" in caplog.text) == (option in ("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2",
                                                                 "fp8_e5m2_fast"))  # fmt: skip
        assert ("kept as it is" in caplog.text) == ("e5m2" in option)
    assert relative(run(model), plain[1]) < 0.2


@pytest.mark.parametrize("option", OPTIONS)
def test_plain_fp8_file_keeps_its_bytes(t2v, option, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_fp8(t2v, path, scaled=False)
    options = replace(FP32, quantization=option)
    if option.startswith("fp8") and "scaled" in option:
        with pytest.raises(ValueError, match="has none"):
            load_wan_model(path, options, HOST, SYSTEMS)
        return
    model = load_wan_model(path, options, HOST, SYSTEMS)
    if not option.startswith("fp4"):
        layer = model.transformer.blocks[1].cross_attn.k
        assert torch.equal(layer.scale_weight, torch.ones(128, 1))
    want = run(load_wan_model(path, FP32, HOST, SYSTEMS))
    assert relative(run(model), want) < 0.2


def save_parts(path, tensors, metadata, count):
    """Every tensor goes to the part after that of the one before, so that scales and weights are apart.

    The header of a part names the layers that it holds.
    """
    names = [path.with_name(f"{path.stem}-{part:05d}-of-{count:05d}.safetensors") for part in range(1, count + 1)]
    layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    for part, name in enumerate(names):
        held = dict(list(tensors.items())[part::count])
        own = {layer: mark for layer, mark in layers.items() if f"{layer}.weight" in held}
        marks = {"_quantization_metadata": json.dumps({"layers": own})} if layers else {}
        save_file(held, name, metadata={**metadata, **marks})
    return names


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "nvfp4, marked in the header"])
def test_scales_in_another_part_of_the_file(t2v, kind, tmp_path):
    path = tmp_path / "m.safetensors"
    save_fp8(t2v, path, scaled=True) if kind == "fp8" else save_nvfp4(t2v, path, header="header" in kind)
    whole = load_wan_model(path, FP32, HOST, SYSTEMS)
    with safe_open(path, "pt") as file:
        parts = save_parts(path, load_file(path), file.metadata(), 3)
    assert torch.equal(run(load_wan_model(parts[1], FP32, HOST, SYSTEMS)), run(whole))
    save_file(load_file(parts[0]), parts[2])
    with pytest.raises(ValueError, match=r"00003-of-00003.* and .*00001-of-00003.* both hold .*again\.$"):
        load_wan_model(parts[0], FP32, HOST, SYSTEMS)


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_nvfp4_file(t2v, option, header, tmp_path):
    path = tmp_path / "nvfp4.safetensors"
    save_nvfp4(t2v, path, header=header, input_scale=1.0)
    options = replace(FP32, quantization=option)
    if option.startswith("fp8"):
        instead = "fp4_scaled_fast" if option.endswith("_fast") else "fp4_scaled"
        with pytest.raises(ValueError, match=f"holds NVFP4 weights.*choose '{instead}'"):
            load_wan_model(path, options, HOST, SYSTEMS)
        return
    model = load_wan_model(path, options, HOST, SYSTEMS)
    assert kinds(model) == {Nvfp4Fp8Linear if option.endswith("fast") else Nvfp4Linear}
    layer, stored = model.transformer.blocks[0].self_attn.o, load_file(path)
    assert torch.equal(layer.weight, stored["blocks.0.self_attn.o.weight"])
    tensors = {n: values_of(quantize_nvfp4(v)) if quantizable(n, v) else v for n, v in t2v.tensors.items()}
    replace(t2v, tensors=tensors).save(tmp_path / "expanded.safetensors", torch.float32)
    want = run(load_wan_model(tmp_path / "expanded.safetensors", FP32, HOST, SYSTEMS))
    assert relative(run(model), want) < (0.06 if option.endswith("fast") else 0.02)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_comfy_fp8_file(t2v, plain, scale, dtype, tmp_path):
    path = tmp_path / "comfy.safetensors"
    save_comfy_fp8(t2v, path, input_scale=scale, dtype=dtype)
    option = "fp8_e4m3fn_scaled_fast" if dtype == torch.float8_e4m3fn else "fp8_e5m2_scaled_fast"
    model = load_wan_model(path, replace(FP32, quantization=option), HOST, SYSTEMS)
    layer = model.transformer.blocks[0].self_attn.q
    assert layer.weight.dtype == dtype and layer.takes_rows == (scale == 1.0)
    assert relative(run(model), plain[1]) < 0.12
    assert kinds(load_wan_model(path, FP32, HOST, SYSTEMS)) == {Fp8Linear}


def test_a_file_may_ask_for_full_precision(t2v, tmp_path):
    mark = {"full_precision_matrix_mult": True}
    save_comfy_fp8(t2v, tmp_path / "fp8.safetensors", input_scale=1.0, mark=mark)
    save_nvfp4(t2v, tmp_path / "fp4.safetensors", mark=mark)
    for name, option, kind in (
        ("fp8.safetensors", "fp8_e4m3fn_scaled_fast", Fp8Linear), ("fp4.safetensors", "fp4_scaled_fast", Nvfp4Linear)
    ):  # fmt: skip
        assert kinds(load_wan_model(tmp_path / name, replace(FP32, quantization=option), HOST, SYSTEMS)) == {kind}


def test_full_precision_outlives_a_change_of_storage(t2v, tmp_path):
    save_comfy_fp8(t2v, tmp_path / "m.safetensors", input_scale=1.0, mark={"full_precision_matrix_mult": True})
    model = load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization="fp4_scaled_fast"), HOST, SYSTEMS)
    assert kinds(model) == {Nvfp4Linear}


@pytest.mark.parametrize("option", ["fp8_e4m3fn_scaled", *FROM_BF16])
def test_a_module_file_does_not_decide_for_the_main_file(option, tmp_path):
    main, speech = tmp_path / "i2v.safetensors", tmp_path / "infinitetalk.safetensors"
    tiny.image_to_video().save(main, torch.bfloat16)
    save_fp8(tiny.speech_module(), speech, scaled=True)
    options = replace(FP32, quantization=option, modules=(ModuleFile(speech),))
    if option == "fp8_e4m3fn_scaled":
        with pytest.raises(ValueError, match="i2v.safetensors has none: choose 'fp8_e4m3fn' or 'disabled'"):
            load_wan_model(main, options, HOST, SYSTEMS)
        return
    block = load_wan_model(main, options, HOST, SYSTEMS).transformer.blocks[0]
    assert type(block.self_attn.q) is FROM_BF16[option][0]
    kept = block.audio_cross_attn.proj
    assert type(kept) is (Fp8MatmulLinear if option.endswith("_fast") else Fp8Linear)
    stored = load_file(speech)["blocks.0.audio_cross_attn.proj.weight"]
    assert torch.equal(kept.weight.view(torch.uint8), stored.view(torch.uint8))


def test_a_module_file_in_base_precision_becomes_nvfp4_with_the_main_file(tmp_path):
    main, speech = tmp_path / "i2v.safetensors", tmp_path / "infinitetalk.safetensors"
    save_fp8(tiny.image_to_video(), main, scaled=True)
    tiny.speech_module().save(speech, torch.bfloat16)
    options = replace(FP32, quantization="fp4_experimental", modules=(ModuleFile(speech),))
    assert kinds(load_wan_model(main, options, HOST, SYSTEMS)) == {Nvfp4Linear}


@pytest.mark.parametrize(("option", "format"), [("fp8_e5m2_fast", "E5M2"), ("fp8_e4m3fn_fast", "E4M3")])
def test_the_formats_that_will_be_multiplied_are_tried(plain, option, format, monkeypatch):
    tried = []
    monkeypatch.setattr(quantization, "runs_fp8", lambda device, dtype: tried.append(dtype))
    load_wan_model(plain[0], replace(FP32, quantization=option), HOST, SYSTEMS)
    assert tried == [torch.float8_e5m2 if format == "E5M2" else torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_scale": None}, r"'blocks\.0\.ffn\.0' is marked as NVFP4 but lacks its scales; download"),
        ({"weight_scale": torch.ones(256, 4).to(torch.float8_e4m3fn)}, r"an NVFP4 weight of \(256, 128\) has F8_E4M3"),
        ({"weight_scale": torch.ones(256, 8)}, r"'blocks\.0\.ffn\.0\.weight_scale' is F32 \(256, 8\), but"),
    ],
)
def test_block_scales_that_do_not_fit_are_named(t2v, change, match, tmp_path):
    save_nvfp4(t2v, tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    tensors |= {f"blocks.0.ffn.0.{leaf}": value for leaf, value in change.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "m.safetensors", metadata=t2v.metadata)
    with pytest.raises(ValueError, match=match):
        load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)


def test_a_broken_mark_is_named(t2v, tmp_path):
    save_comfy_fp8(t2v, tmp_path / "m.safetensors", input_scale=1.0)
    tensors = load_file(tmp_path / "m.safetensors")
    tensors["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(b'{"forma'), dtype=torch.uint8)
    save_file(tensors, tmp_path / "m.safetensors", metadata=t2v.metadata)
    with pytest.raises(ValueError, match=r"m\.safetensors.*'blocks\.0\.ffn\.0\.comfy_quant' is no JSON.*again\.$"):
        load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)
    for text in (b"null", b"[]", b'{"layers": []}'):
        tensors["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        save_file(tensors, tmp_path / "m.safetensors", metadata=t2v.metadata)
        with pytest.raises(ValueError, match=r"'blocks\.0\.ffn\.0\.comfy_quant' is no JSON object.*again\.$"):
            load_wan_model(tmp_path / "m.safetensors", FP32, HOST, SYSTEMS)


def test_gguf_has_its_own(t2v, tmp_path):
    save_gguf(t2v, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="GGUF.*choose quantization 'disabled'"):
        load_wan_model(tmp_path / "model.gguf", replace(FP32, quantization="fp8_e4m3fn"), HOST, SYSTEMS)


def test_unknown_option(plain):
    with pytest.raises(ValueError, match="'int4' does not exist; choose one of: disabled, fp8_e4m3fn"):
        load_wan_model(plain[0], replace(FP32, quantization="int4"), HOST, SYSTEMS)


@pytest.mark.parametrize("option", [o for o, row in QUANTIZATIONS.items() if row.fast])
def test_old_gpus_are_refused_at_load(t2v, option, tmp_path, monkeypatch):
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    monkeypatch.setattr(quantization, "runs_fp8", lambda device, dtype: "it has compute capability 8.6")
    with pytest.raises(ValueError, match=rf"8\.6. Choose '{option.removesuffix('_fast')}'"):
        load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option), HOST, SYSTEMS)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_kernel_argument_is_ready(t2v, option, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=True)
    file = lora(t2v, tmp_path / "l.safetensors", merge=True)
    model = load_wan_model(tmp_path / "m.safetensors", replace(FP32, quantization=option, loras=(file,)), HOST, SYSTEMS)
    assert all(tensor_layout.is_kernel_ready(p, strided=False) for p in model.transformer.parameters())
    assert run(model).isfinite().all()


def lora(t2v, path, **options):
    tiny.lora(t2v).save(path, torch.float32)
    return LoraFile(path=path, **options)


@pytest.mark.parametrize("scaled", [None, True])
@pytest.mark.parametrize("option", [o for o in FROM_BF16 if o != "disabled"])
def test_merged_loras_are_rounded_once(t2v, option, scaled, tmp_path):
    path = tmp_path / "m.safetensors"
    t2v.save(path, torch.float32) if scaled is None else save_fp8(t2v, path, scaled=scaled)
    files = [lora(t2v, tmp_path / f"{n}.safetensors", strength=n / 2) for n in (1, 3)]
    options = replace(FP32, quantization=option)
    layer = load_wan_model(path, replace(options, loras=tuple(files)), HOST, SYSTEMS).transformer.blocks[1].self_attn.q
    base = load_wan_model(path, FP32, HOST, SYSTEMS).transformer
    plain = base.blocks[1].self_attn.q
    exact = plain.weight if scaled is None else plain.expanded(torch.float32)
    change = read_lora(files[0], base).changes["blocks.1.self_attn.q"][0].delta(exact.shape)
    arguments = () if option.startswith("fp4") else (layer.weight.dtype,)
    want = type(layer).quantize(exact + 2 * change, None, *arguments)
    assert change.norm() > 0 and relative(layer.expanded(torch.float64), want.expanded(torch.float64)) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", [o for o in FROM_BF16 if o != "disabled"])
def test_lora_merged_beside_and_compiled(t2v, plain, option, device, tmp_path):
    torch._dynamo.reset()
    options, host = replace(FP32, quantization=option), StandaloneHost(device=device)
    file = lora(t2v, tmp_path / "l.safetensors", strength=3.0)
    exact = run(load_wan_model(plain[0], replace(FP32, loras=(file,)), HOST, SYSTEMS))
    base = load_wan_model(plain[0], options, host, SYSTEMS)
    beside = with_loras(base, (replace(file, merge=False),))
    merged = load_wan_model(plain[0], replace(options, loras=(file,)), host, SYSTEMS)
    tolerance = FROM_BF16[option][1] * 1.3
    for model in (beside, merged):
        assert relative(run(model, device), exact) < tolerance
    assert relative(run(base, device), exact) > relative(run(beside, device), exact)
    compiled = replace(beside, options=replace(options, compile=CompileArgs(backend="aot_eager", fullgraph=True)))
    assert relative(run(compiled, device), run(beside, device)) < 1e-5 or device == "cuda"


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("option", [o for o in FROM_BF16 if o != "disabled"])
def test_block_swap_takes_the_scales_along(plain, option, ahead):
    options = replace(FP32, base_dtype=torch.bfloat16, quantization=option)
    model = load_wan_model(plain[0], options, StandaloneHost(device="cuda"), SYSTEMS)
    want = run(model, "cuda")
    swap = BlockSwapArgs(blocks_to_swap=3, use_non_blocking=True, prefetch_blocks=ahead)
    swapped = replace(model, block_swap=swap)
    assert torch.equal(run(swapped, "cuda"), want)
    with swapped.active() as transformer:
        assert not any(p.is_cuda for p in transformer.blocks[2].parameters())


def test_what_a_device_lacks_is_tried(monkeypatch):
    """Apple's MPS raises TypeError for float64 and FP8."""
    make = torch.empty

    def empty(*size, dtype, device):
        if dtype in (torch.float64, *FP8_DTYPES.values()):
            raise TypeError(f"Trying to convert {dtype} to the MPS backend but it does not have support for that.")
        return make(*size, dtype=dtype, device=device)

    cpu = torch.device("cpu")
    assert all(holds.__wrapped__(cpu, dtype) for dtype in (torch.float64, torch.float32, *FP8_DTYPES.values()))
    monkeypatch.setattr(torch, "empty", empty)
    kept = [holds.__wrapped__(cpu, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float8_e5m2)]
    assert kept == [False, True, False]


def test_devices_without_fp8_are_told_before_weights_are_read(t2v, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("wanvideo_wrapper.quantized.fp8.holds", lambda device, dtype: dtype not in FP8_DTYPES.values())
    monkeypatch.setattr("wanvideo_wrapper.wanvideo.loading.build", lambda *_, **__: "loaded")
    fp8, speech, main = (tmp_path / f"{name}.safetensors" for name in ("fp8", "speech", "i2v"))
    save_fp8(t2v, fp8, scaled=False)
    tiny.image_to_video().save(main, torch.bfloat16)
    save_fp8(tiny.speech_module(), speech, scaled=False)
    assert load_wan_model(plain[0], FP32, HOST, SYSTEMS) == "loaded"
    for path, options, says in (
        (fp8, FP32, "^fp8.safetensors holds weights in FP8, which 'cpu' devices do not have: use a file in bf16, fp16"),
        (main, replace(FP32, modules=(ModuleFile(speech),)), "^speech.safetensors holds weights in FP8"),
        (plain[0], replace(FP32, quantization="fp8_e4m3fn"), "^quantization 'fp8_e4m3fn' makes weights in FP8"),
    ):
        with pytest.raises(ValueError, match=says):
            load_wan_model(path, options, HOST, SYSTEMS)


@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn", "fp8_e4m3fn_scaled", "fp8_e5m2"])
def test_compiled_code_never_reads_fp8(t2v, option, tmp_path):
    """Triton has no E4M3 before compute capability 8.9, where all other options than the fast ones run, too."""
    torch._dynamo.reset()
    save_fp8(t2v, tmp_path / "m.safetensors", scaled=option.endswith("scaled"))
    file, seen = lora(t2v, tmp_path / "l.safetensors", strength=1.0), []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            values = [n.meta.get("example_value") for n in (node, *node.all_input_nodes)]
            dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
            seen.extend((node.op, str(node.target)) for _ in dtypes & set(FP8_DTYPES.values()))
        return graph.forward

    options = replace(FP32, quantization=option, compile=CompileArgs(backend=backend, fullgraph=True))
    model = load_wan_model(tmp_path / "m.safetensors", options, HOST, SYSTEMS)
    run(with_loras(model, (replace(file, merge=False),)))
    assert {op for op, _ in seen} == {"placeholder", "call_function"}
    assert {target for op, target in seen if op == "call_function"} == {PRODUCT}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", OPTIONS)
def test_talking_video(option, base, device, tmp_path, monkeypatch):
    """The matrix for a memory checker: every option through self-, cross-, image and audio attention."""
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    main, speech = tmp_path / "i2v.safetensors", tmp_path / "infinitetalk.safetensors"
    save_fp8(tiny.image_to_video(), main, scaled=True)
    tiny.speech_module().save(speech, torch.bfloat16)
    options = LoadOptions(base_dtype=base, quantization=option, modules=(ModuleFile(speech),))
    model = load_wan_model(main, options, StandaloneHost(device=device), SYSTEMS)
    features = [e for e in model.transformer.extensions if type(e).__name__ == "MultiTalk"][0].features
    audio = torch.randn(1, 2, 5, 5, 1, features, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(3, 4, 4)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    payload = AudioWindow(audio, torch.tensor(1.0), masks).to(torch.device(device), base)
    got = run(model, device, (payload,))
    assert got.isfinite().all()
    exact = load_wan_model(main, LoadOptions(base_dtype=torch.float32, modules=(ModuleFile(speech),)), HOST, SYSTEMS)
    assert relative(got, run(exact, payloads=(AudioWindow(audio, torch.tensor(1.0), masks),))) < 0.25
