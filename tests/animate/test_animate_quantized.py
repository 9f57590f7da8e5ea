"""A model of two blocks, quantized; its adapter keeps base precision. On a GPU this is for a memory checker."""

import pytest
import torch
from contract import cases_of
from float64_wan import rand, relative
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]
CASE = cases_of("animate")["animate"]


@torch.no_grad()
def run(path, device, **options):
    options = LoadOptions(**{"base_dtype": torch.float32, **options})
    model = load_wan_model(path, options, StandaloneHost(device=device), SYSTEMS)
    inputs = ModelInputs(
        latents=rand(1, 16, 3, 4, 4, seed=4).to(device), timestep=torch.tensor([700.0], device=device),
        text=(rand(5, tiny.TEXT_DIM, seed=5).to(device),),
        payloads=(CASE.payload.to(torch.device(device), model.base_dtype),),
    )  # fmt: skip
    with model.active() as transformer:
        return transformer(inputs).cpu(), dict(model.transformer.named_modules())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("option", "tolerance"), [("fp8_e4m3fn_fast", 0.1), ("fp4_scaled", 0.25), ("fp4_scaled_fast", 0.3)]
)
def test_quantized(option, tolerance, device, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    path = tmp_path / "animate.safetensors"
    tiny.transformer(in_dim=36, layers=2, extensions=(CASE.extension,)).save(path)
    got, layers = run(path, device, quantization=option, base_dtype=torch.bfloat16)
    assert isinstance(layers["blocks.0.ffn.0"], QuantizedLinear)
    assert not any(isinstance(m, QuantizedLinear) for n, m in layers.items() if n.startswith("face_adapter"))
    assert relative(got, run(path, "cpu")[0].double()) < tolerance
