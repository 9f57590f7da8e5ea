"""WanVideoTorchCompileSettings: how often blocks are compiled, counted. All blocks of a list share their graphs."""

import math

import pytest
import torch
import torch._dynamo.testing
from contract import SIZES, randomize
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.compilation import CompileArgs, compiled, refuse_unless_it_compiles
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

SMALL, WIDE, LONG = (3, 4, 4), (3, 6, 8), (5, 4, 4)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return randomize(WanModel(WanConfig(**{**SIZES, "num_layers": 2})))


@pytest.fixture
def counter():
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


def run(model, size, *, step=0, seed=0, prompt=4):
    """A forward of one step, with a prompt of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return model(
        ModelInputs(
            latents=torch.randn(1, 16, *size, generator=generator), timestep=torch.tensor([900.0 - 100 * step]),
            text=(torch.randn(prompt, 8, generator=generator),), step=Step(index=step, total=8, in_run=step),
        )
    )  # fmt: skip


def turns(size):
    """Two windows, their steps, and in each step the passes with the prompt and without it."""
    return [(size, step, seed, prompt) for seed in (0, 1) for step in range(3) for prompt in (4, 2)]


@torch.no_grad()
@pytest.mark.parametrize("at_once", [0, 5], ids=["whole", "pieces"])
def test_steps_windows_and_passes_compile_once(model, counter, at_once):
    args = CompileArgs(backend=counter, fullgraph=True)
    want = [run(model, size, step=step, seed=seed, prompt=prompt) for size, step, seed, prompt in turns(SMALL)]
    for _ in range(2):
        with compiled(model.stacks().values(), args), model.sparing(at_once):
            got = [run(model, size, step=step, seed=seed, prompt=prompt) for size, step, seed, prompt in turns(SMALL)]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_size_that_comes_back_is_known(model, counter):
    with compiled(model.stacks().values(), CompileArgs(backend=counter, fullgraph=True)):
        for size in (SMALL, WIDE, SMALL, WIDE, SMALL):
            run(model, size)
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("pieces", [1, 3])
def test_dynamic_sizes_share_graphs(model, counter, pieces):
    """Sizes whose tokens run in as many pieces are one bucket."""
    want = {size: run(model, size) for size in (SMALL, WIDE, LONG)}
    with compiled(model.stacks().values(), CompileArgs(backend=counter, fullgraph=True, dynamic=True)):
        for size, wanted in want.items():
            with model.sparing(0 if pieces == 1 else -(-math.prod(size) // 4 // pieces)):
                torch.testing.assert_close(run(model, size), wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count < len(want)


def no_compiler(graph, inputs):
    """A backend of a machine without one."""
    raise RuntimeError("No working C++ compiler found\nand so on, for pages")


def test_a_missing_compiler_is_told_before_weights_are_read(tmp_path, monkeypatch):
    torch._dynamo.reset()
    tiny.transformer(in_dim=16).save(tmp_path / "m.safetensors")
    options = LoadOptions(base_dtype=torch.float32, compile=CompileArgs(backend=no_compiler))
    monkeypatch.setattr("wanvideo_wrapper.wanvideo.loading.build", None)
    says = r"^torch.compile cannot run here: RuntimeError: No .* compiler found\. Please disconnect compile_args"
    with pytest.raises(ValueError, match=says):
        load_wan_model(tmp_path / "m.safetensors", options, StandaloneHost(device="cpu"), SYSTEMS)


@torch.no_grad()
def test_a_block_that_cannot_be_compiled_ends_in_a_sentence(model):
    args = CompileArgs(backend=no_compiler, fullgraph=True)
    says = "^The blocks cannot be compiled here: RuntimeError: No working .* found. Please disconnect compile_args"
    with pytest.raises(ValueError, match=says), compiled(model.stacks().values(), args):
        run(model, SMALL)
    # Afterwards they run as they are.
    assert run(model, SMALL).isfinite().all()


@torch.no_grad()
def test_a_full_device_is_no_missing_compiler(model):
    def full(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    torch._dynamo.reset()
    args = CompileArgs(backend=full)
    refuse_unless_it_compiles(args, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError), compiled(model.stacks().values(), args):
        run(model, SMALL)
