"""The transformer and its attention on a GPU: the same numbers as on the CPU, and no misaligned address."""

import pytest
import torch
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

pytestmark = pytest.mark.cuda
SPEECH = MultiTalk(features=24, intermediate_dim=32, context_tokens=8, output_dim=64, voiced=(0, 1))


def talking_model():
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=36, text_dim=64, text_len=16)
    model = WanModel(config, (ClipImageExtension(clip_dim=80), SPEECH, EnhanceAVideo()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def talking_inputs(device, dtype):
    payloads = (
        ClipImage(torch.randn(1, 257, 80)),
        AudioWindow(torch.randn(1, 1, 9, 5, 3, 8), torch.tensor(1.0)),
        EnhanceArgs(4.0),
    )
    return ModelInputs(
        latents=torch.randn(1, 36, 3, 16, 12).to(device),
        timestep=torch.tensor([637.5], device=device),
        text=(torch.randn(11, 64).to(device),),
        payloads=tuple(p.to(device, dtype) for p in payloads),
    )


def on(inputs, device, dtype):
    return ModelInputs(
        latents=inputs.latents.to(device), timestep=inputs.timestep.to(device),
        text=tuple(t.to(device) for t in inputs.text), payloads=tuple(p.to(device, dtype) for p in inputs.payloads),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_equals_the_cpu(dtype, tolerance):
    model = talking_model()
    inputs = talking_inputs("cpu", torch.float32)
    want = model(inputs)
    got = model.to("cuda", dtype)(on(inputs, "cuda", dtype)).cpu()
    assert torch.isfinite(got).all()
    assert (got - want).norm() / want.norm() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("offset", range(8))
def test_offset_views_do_not_fault(offset):
    storage = torch.randn(3, 2 * 33 * 4 * 64 + 8, device="cuda", dtype=torch.bfloat16)
    q, k, v = (row[offset : offset + 2 * 33 * 4 * 64].view(2, 33, 4, 64) for row in storage)
    got = sdpa()(q, k, v)
    torch.cuda.synchronize()
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    want = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2)
    assert (got.double() - want).norm() / want.norm() < 1e-2


@torch.no_grad()
@pytest.mark.slow
def test_compiled_blocks_equal_eager():
    model = talking_model().to("cuda", torch.bfloat16)
    inputs = talking_inputs("cuda", torch.bfloat16)
    want = model(inputs)
    for block in model.blocks:
        block.compile(fullgraph=True)
    got = model(inputs)
    assert (got - want).norm() / want.norm() < 2e-2
