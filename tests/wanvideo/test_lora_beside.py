"""LoRAs beside the weights: every kind on every storage against float64, compiled in every order, and gone again."""

import copy
import gc
import weakref
from dataclasses import replace

import lora_files
import pytest
import torch
import torch._dynamo.testing
from gguf import GGMLQuantizationType, quants
from lora_files import KINDS, randn, save, spelled
from torch import nn
from torch._dynamo.testing import CompileCounter
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.quantized.gguf import GgufLinear
from wanvideo_wrapper.quantized.int4 import Int4Linear
from wanvideo_wrapper.quantized.int8 import Int8MatmulLinear
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8MatmulLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Fp8Linear, Nvfp4Linear, Nvfp4MatmulLinear
from wanvideo_wrapper.quantized.w4a8 import W4a8MatmulLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model, with_loras
from wanvideo_wrapper.wanvideo.lora import LoraFile, beside
from wanvideo_wrapper.wanvideo.modules import layers
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

N, K = 96, 64
CPU = torch.device("cpu")
STORAGES = {
    "float32": (torch.float32, lambda w, b: plain(w, b, torch.float32), 1e-5),
    "bfloat16": (torch.bfloat16, lambda w, b: plain(w, b, torch.bfloat16), 1e-2),
    "FP8": (torch.bfloat16, lambda w, b: Fp8Linear.quantize(w, b, torch.float8_e4m3fn), 1e-2),
    "FP8 in float32": (torch.float32, lambda w, b: Fp8Linear.quantize(w, b, torch.float8_e5m2), 1e-5),
    "FP8 products": (torch.bfloat16, lambda w, b: Fp8MatmulLinear.quantize(w, b, torch.float8_e4m3fn), 1e-2),
    "FP8 products, scale of the file": (torch.bfloat16, lambda w, b: static(w, b), 1e-2),
    "NVFP4": (torch.bfloat16, Nvfp4Linear.quantize, 1e-2),
    "NVFP4 in FP8 products": (torch.bfloat16, Nvfp4Fp8Linear.quantize, 1e-2),
    "NVFP4 products": (torch.bfloat16, Nvfp4MatmulLinear.quantize, 1e-2),
    "GGUF": (torch.bfloat16, lambda w, b: blocks(w, b), 1e-2),
    "MXFP8 products": (torch.bfloat16, Mxfp8MatmulLinear.quantize, 1e-2),
    "INT8 products": (torch.bfloat16, lambda w, b: Int8MatmulLinear.quantize(w, b, 64), 1e-2),
    "INT4": (torch.float32, lambda w, b: Int4Linear.quantize(w, b, 64), 1e-5),
    "W4A8 products": (torch.bfloat16, lambda w, b: W4a8MatmulLinear.quantize(w, b, 16, 64), 1e-2),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])])
def device(request):
    return torch.device(request.param)


def plain(weight, bias, dtype):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer.to(dtype)


def static(weight, bias):
    from wanvideo_wrapper.quantized.fp8 import quantize_rows

    return Fp8MatmulLinear(*quantize_rows(weight, torch.float8_e4m3fn), bias, torch.tensor(0.01))


def blocks(weight, bias):
    rows = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    return GgufLinear(torch.from_numpy(rows), "Q4_0", bias)


class Block(nn.Module):
    def __init__(self, layer, dtype):
        super().__init__()
        self.norm = WanRMSNorm(K, 1e-6)
        self.q = layer
        self.back = plain(randn(K, N), None, dtype)
        self.modulation = nn.Parameter(randn(1, 2, K))

    def forward(self, x):
        shift, scale = self.modulation.unbind(1)
        return x + self.back(self.q(self.norm(x) * (1 + scale).to(x.dtype) + shift.to(x.dtype)))


class Model(nn.Module):
    def __init__(self, storage="float32", count=3):
        super().__init__()
        dtype, make, _ = STORAGES[storage]
        self.blocks = nn.ModuleList(Block(make(randn(N, K), randn(N)), dtype) for _ in range(count))
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def values(layer):
    return layer.expanded(torch.float32) if hasattr(layer, "expanded") else layer.weight.float()


def file_of(path, tensors, **options):
    return LoraFile(path=save(path, tensors), merge=False, **options)


def everything(rank, path, *, kind="pair", model=None, **options):
    """A LoRA in all layers of a `Model` (whose weights DoRA's kinds need), a bias, a norm and the modulation."""
    tensors = {}
    for index in range(3):
        weight = torch.empty(N, K) if model is None else values(model.blocks[index].q).cpu()
        tensors |= spelled("kijai", f"blocks.{index}.q", KINDS[kind](weight, rank)[0])
        tensors |= spelled("kijai", f"blocks.{index}", {".diff_m": randn(1, 2, K), ".norm.diff": randn(K)})
        tensors[f"diffusion_model.blocks.{index}.q.diff_b"] = randn(N)
    return file_of(path, tensors, **options)


def relative(got, want):
    assert want.norm() > 0
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_storage(kind, storage, device, tmp_path):
    dtype, _, tolerance = STORAGES[storage]
    model = Model(storage, count=1).to(device)
    layer, x = model.blocks[0].q, torch.randn(2, 5, K).to(device, dtype)
    base = layer(x)
    read = quantize(x).to(torch.float64) if getattr(layer, "takes_rows", False) else x.double()
    for rank in (4, 8, 32, 128):
        parts, delta = KINDS[kind](values(layer).cpu(), rank)
        file = file_of(tmp_path / f"{rank}.safetensors", spelled("kijai", "blocks.0.q", parts), strength=0.7)
        with beside(model, (file,), device, dtype):
            got = layer(x).double() - base.double()
        want = 0.7 * read @ delta.T.to(device)
        # What the base's own rounding costs; DoRA rescales the base's result, whose FP8 and FP4 products round too.
        floor = (8 if "dora" in kind else 1) * tolerance * base.double().norm() / want.norm()
        assert relative(got, want) < tolerance + floor, rank
        assert torch.equal(layer(x), base)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["FP8 products", "NVFP4 in FP8 products"])
def test_rows_that_are_quantized_already(storage, device, tmp_path):
    model = Model(storage, count=1).to(device)
    layer, x = model.blocks[0].q, torch.randn(2, 5, K).to(device, torch.bfloat16)
    rows = quantize(x)
    base = layer(rows)
    parts, delta = lora_files.pair_alpha(values(layer).cpu(), 32)
    file = file_of(tmp_path / "l.safetensors", spelled("kijai", "blocks.0.q", parts), strength=20.0)
    with beside(model, (file,), device, torch.bfloat16):
        got = layer(rows)
        assert torch.equal(layer(x), got)
    # As precise as a product in bfloat16, though its operands are FP8.
    assert relative(got.double() - base.double(), 20 * rows.to(torch.float64) @ delta.T.to(device)) < 5e-3


@torch.no_grad()
def test_several_files_and_strengths_by_the_step(tmp_path):
    model, x = Model(), torch.randn(1, 4, K)
    layer = model.blocks[1].q
    (one, first), (two, second) = lora_files.pair_alpha(layer.weight, 4), lora_files.lokr_factored(layer.weight, 8)
    (three, third), bias = lora_files.pair(layer.weight, 16), randn(N)
    files = (
        file_of(tmp_path / "1.safetensors", spelled("kijai", "blocks.1.q", one), strength=(0.5, 0.0, -2.0)),
        file_of(tmp_path / "2.safetensors", spelled("kijai", "blocks.1.q", two), strength=0.3),
        file_of(tmp_path / "3.safetensors", spelled("kijai", "blocks.1.q", three | {".diff_b": bias}),
                strength=(1.0, 2.0)),
    )  # fmt: skip
    base = layer(x).double()
    with beside(model, files, CPU, torch.float32) as state:
        for step in (0, 1, 2, 7, 0):
            strengths = [file.at(step) for file in files]
            assert strengths == {0: [0.5, 0.3, 1.0], 1: [0.0, 0.3, 2.0]}.get(step, [-2.0, 0.3, 2.0])
            state.set_step(step)
            delta = sum(s * d for s, d in zip(strengths, (first, second, third), strict=True))
            assert relative(layer(x), base + x.double() @ delta.T + strengths[2] * bias.double()) < 1e-6


def compile_blocks(model, compiler):
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=compiler, fullgraph=True)


# -: none, A, B: one of two of other ranks and kinds, +: both.
ORDERS = [
    *(
        (order, storage, ("pair", "pair"))
        for order in ("-A-B+", "A-B+A", "B+-A", "+AB-A") for storage in ("float32", "FP8 products")
    ),
    *(
        ("-A-B+A", storage, ("pair", "pair"))
        for storage in ("bfloat16", "FP8", "NVFP4", "NVFP4 in FP8 products", "GGUF", "INT8 products", "W4A8 products")
    ),
    *(
        (order, storage, ("dora_comfyui", "lokr_both"))
        for order, storage in (("-A-B+A", "bfloat16"), ("B-+A", "FP8 products"), ("+-AB", "NVFP4"), ("A+B-A", "GGUF"))
    ),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("order", "storage", "kinds"), ORDERS)
def test_compiled_blocks_in_every_order_of_runs(order, storage, kinds, device, tmp_path):
    """Each compiles once, and is what eager computes."""
    dtype = STORAGES[storage][0]
    model, x = Model(storage).to(device), torch.randn(1, 4, K).to(device, dtype)
    a = everything(4, tmp_path / "a.safetensors", kind=kinds[0], model=model)
    b = everything(16, tmp_path / "b.safetensors", kind=kinds[1], model=model, strength=0.5)
    runs, eager, compiler = {"-": (), "A": (a,), "B": (b,), "+": (a, b)}, {}, CompileCounter()
    for name, files in runs.items():
        with beside(model, files, device, dtype):
            eager[name] = model(x)
    assert len({float(value.double().sum()) for value in eager.values()}) == 4
    compile_blocks(model, compiler)
    for name in order:
        with beside(model, runs[name], device, dtype):
            got = model(x)
            # A GPU's products of float32 may add up in another order where they are compiled.
            assert torch.equal(got, eager[name]) or (x.is_cuda and relative(got, eager[name]) < 1e-6), name
    assert compiler.frame_count == len(set(order))


@torch.no_grad()
def test_steps_windows_and_strengths_compile_nothing_anew(device, tmp_path, monkeypatch):
    """12 steps of 2 windows at 3 strengths, under an option with FP8 products: one graph for all blocks."""
    # A graph has no fused kernels, whose last bits FP8 makes large: on a GPU, too, it is compared to eager PyTorch.
    monkeypatch.setattr(layers, "_runs_fused", lambda x: False)
    whole, counter = tiny.transformer(in_dim=16, layers=2), torch._dynamo.testing.CompileCounterWithBackend("eager")
    whole.save(tmp_path / "m.safetensors")
    tensors = {}
    for key, weight in whole.tensors.items():
        if key.startswith("blocks.") and weight.dim() == 2 and key.endswith(".weight"):
            tensors |= spelled("kijai", key.removesuffix(".weight"), lora_files.pair(weight, 8)[0])
    lora = save(tmp_path / "l.safetensors", tensors)
    settings = CompileArgs(backend=counter, fullgraph=True)
    options = LoadOptions(base_dtype=torch.bfloat16, quantization="fp8_e4m3fn_fast", compile=settings)
    model = load_wan_model(tmp_path / "m.safetensors", options, StandaloneHost(device=str(device)), SYSTEMS)
    plain, text = replace(options, compile=None), torch.randn(5, tiny.TEXT_DIM)
    windows = torch.randn(2, 1, 16, 3, 4, 4, device=device)

    def outputs(model, windows):
        for window in windows:
            with model.active() as transformer:
                for step in range(12):
                    model.set_step(step)
                    yield transformer(ModelInputs(
                        latents=window, timestep=torch.tensor([1000.0 - 80 * step], device=device),
                        text=(text.to(device),), step=Step(index=step, total=12, in_run=step),
                    ))  # fmt: skip

    # Loading has tried whether anything compiles.
    counter.clear()
    torch._dynamo.reset()
    results = []
    for strength in (0.2, 0.4, (0.1, 0.2, 0.3, 0.7)):
        changed = with_loras(model, (LoraFile(path=lora, strength=strength, merge=False),))
        results += (got := list(outputs(changed, windows)))
        want = outputs(replace(changed, options=plain), windows[1:])
        assert all(relative(*pair) < 1e-2 for pair in zip(got[12:], want, strict=True))
    assert counter.frame_count == 1
    # 0.2 occurs twice in each window.
    assert len({float(result.double().sum()) for result in results}) == 12 * 2 * 3 - 2


@torch.no_grad()
def test_nothing_is_left_behind(tmp_path):
    model, x = Model(), torch.randn(1, 4, K)
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    base, file = model(x), everything(4, tmp_path / "a.safetensors", strength=(0.5, 0.9))
    with pytest.raises(RuntimeError), beside(model, (file,), CPU, torch.float32) as state:
        state.set_step(1)
        assert not torch.equal(model(x), base)
        raise RuntimeError
    assert torch.equal(model(x), base) and list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_slots_travel_with_their_layer(tmp_path):
    """Everything that is large is a parameter of the layer, in aligned storage of its own, and no hook is needed."""
    from wanvideo_wrapper.tensor_layout import is_kernel_ready

    model = Model("FP8 products")
    file = everything(6, tmp_path / "a.safetensors")
    plain = {name for name, _ in model.named_parameters()}
    with beside(model, (file,), CPU, torch.bfloat16):
        slots = {name: p for name, p in model.named_parameters() if name not in plain}
        assert {name.rpartition(".")[2] for name in slots} == {
            "lora_down", "lora_down_rows", "lora_up", "lora_bias", "lora_weight", "lora_modulation",
        }  # fmt: skip
        assert all(is_kernel_ready(p, strided=False) and not p.requires_grad for p in slots.values())
        # Six ranks are filled up to eight, so that rows of the products are whole stretches of 16 bytes.
        assert slots["blocks.0.q.lora_up"].shape == (N, 16) and slots["blocks.0.q.lora_down"].shape == (16, K)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_files_are_read_once_for_all_strengths_and_forgotten_with_the_model(tmp_path, monkeypatch):
    from wanvideo_wrapper.wanvideo.lora import beside as module_function
    from wanvideo_wrapper.wanvideo.lora.reading import read_lora

    opened = []
    module = __import__(module_function.__module__, fromlist=["read_lora"])
    monkeypatch.setattr(module, "read_lora", lambda file, of: opened.append(file.path.name) or read_lora(file, of))
    model = Model()
    a, b = everything(4, tmp_path / "a.safetensors"), everything(4, tmp_path / "b.safetensors")
    for strength in (0.1, 0.2, (0.3, 0.4)):
        with beside(model, (LoraFile(path=a.path, strength=strength, merge=False),), CPU, torch.float32):
            pass
    assert opened == ["a.safetensors"] and len(module._last_read[model]) == 1
    with beside(model, (b,), CPU, torch.float32):
        pass
    assert opened == ["a.safetensors", "b.safetensors"] and len(module._last_read[model]) == 1
    everything(8, b.path)
    with beside(model, (b,), CPU, torch.float32):
        assert model.blocks[0].q.lora_up.shape[1] == 8
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not module._last_read
