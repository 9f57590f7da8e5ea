"""Two quantized blocks that follow a face, the layout check on: for a GPU, and a memory checker."""

import pytest
import torch
from fantasy_models import CONTEXT, portrait_module
from published import relative
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fantasyportrait.extension import K_PROJ, FantasyPortrait, PortraitMotion
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])]


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def velocity(files, option, base, device):
    main, module = files
    options = LoadOptions(base_dtype=base, quantization=option, modules=(ModuleFile(module, FantasyPortrait.file),))
    model = load_wan_model(main, options, StandaloneHost(device=device), SYSTEMS)
    cross = model.transformer.blocks[1].cross_attn
    assert isinstance(cross.k, QuantizedLinear) == (option != "disabled")
    assert not isinstance(getattr(cross, K_PROJ), QuantizedLinear)
    # Batches, references in front and odd counts of tokens give every view that a kernel can meet.
    motion = PortraitMotion(context=rand(1, 3, 37, CONTEXT, seed=3), strength=0.8, leading=1)
    inputs = ModelInputs(
        latents=rand(2, 16, 4, 6, 10, seed=5).to(device),
        timestep=torch.tensor([600.0, 600.0], device=device),
        text=tuple(rand(5, tiny.TEXT_DIM, seed=6 + i).to(device, base) for i in range(2)),
        payloads=(motion.to(torch.device(device), base),),
    )
    with model.active() as transformer:
        return transformer(inputs).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_fast", "fp4_scaled"])
def test_two_blocks(option, device, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    files = tmp_path / "t2v.safetensors", tmp_path / "portrait.safetensors"
    tiny.transformer(in_dim=16, layers=2).save(files[0], torch.bfloat16)
    portrait_module(layers=2, motion=False).save(files[1], torch.bfloat16)
    got = velocity(files, option, torch.bfloat16, device)
    assert got.isfinite().all()
    assert relative(got, velocity(files, "disabled", torch.float32, "cpu")) < 0.25
