"""A model of two blocks with its injectors quantized, swapped, and on a GPU under a memory checker."""

import pytest
import torch
from contract import cases_of
from float64_wan import rand, relative
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.s2v.extension import INJECTORS, MODULATIONS, SpeechToVideo
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]
SIZES = cases_of("s2v")["s2v"].extension
PAYLOAD = SpeechToVideo(
    audio=rand(1, 3, 5, 5), scale=torch.tensor(1.0), reference=rand(1, 16, 1, 8, 10, seed=1),
    pose=rand(1, 16, 2, 8, 10, seed=2), past=rand(1, 16, 3, 8, 10, seed=3), lead=5, lead_latents=1,
)  # fmt: skip
INJECTED = (f"{INJECTORS}.0.q", f"{INJECTORS}.0.v", f"{MODULATIONS}.0.linear")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("s2v") / "s2v.safetensors"
    tiny.transformer(in_dim=16, layers=2, extensions=(SIZES,)).save(path)
    return path


@torch.no_grad()
def run(model, device):
    inputs = ModelInputs(
        latents=rand(1, 16, 2, 8, 10, seed=4).to(device), timestep=torch.tensor([700.0], device=device),
        text=(rand(5, tiny.TEXT_DIM, seed=5).to(device),),
        payloads=(PAYLOAD.to(torch.device(device), model.base_dtype),),
    )  # fmt: skip
    with model.active() as transformer:
        return transformer(inputs).cpu()


def loaded(file, device="cpu", **options):
    options = LoadOptions(**{"base_dtype": torch.float32, **options})
    return load_wan_model(file, options, StandaloneHost(device=device), SYSTEMS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("option", "tolerance"), [("fp8_e4m3fn_fast", 0.1), ("fp4_scaled", 0.25), ("fp4_scaled_fast", 0.3)]
)
def test_injectors_are_quantized_and_get_what_kernels_need(option, tolerance, device, file, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    model = loaded(file, device, quantization=option, base_dtype=torch.bfloat16)
    layers = dict(model.transformer.named_modules())
    assert all(isinstance(layers[name], QuantizedLinear) for name in INJECTED)
    assert not isinstance(layers["casual_audio_encoder.encoder.final_linear"], QuantizedLinear)
    assert relative(run(model, device), run(loaded(file), "cpu").double()) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_injectors_wait_in_main_memory(device, file):
    swap = BlockSwapArgs(blocks_to_swap=2, others={INJECTORS: 1, MODULATIONS: 1})
    want = run(loaded(file, device), device)
    model = loaded(file, device, block_swap=swap)
    torch.testing.assert_close(run(model, device), want, rtol=1e-4, atol=1e-4)
    if device == "cuda":
        # One of them waits.
        assert any(p.device.type == "cpu" for p in model.transformer.audio_injector.injector.parameters())
