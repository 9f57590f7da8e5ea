"""Norm with SiLU, and the sum behind a residual block, against float64 on every type and width."""

import interpreted
import pytest
import torch
import torch.nn.functional as F
from layouts import relative
from wanvideo_wrapper import kernels
from wanvideo_wrapper.kernels.channel_rows import add_biased, norm_silu

TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 5e-4, torch.float32: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LAYOUT = torch.channels_last_3d


def video(channels, dtype, device="cpu"):
    return (torch.randn(1, channels, 3, 4, 5, device=device) * 2 + 0.5).to(dtype).contiguous(memory_format=LAYOUT)


def normed(x, gain, bias):
    y = x.double() + (0 if bias is None else bias.double().view(-1, 1, 1, 1))
    length = y.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    return F.silu(y / length * x.shape[1] ** 0.5 * gain.double().view(-1, 1, 1, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", [5, 96, 384, 1024])
def test_norm_silu(channels, dtype, device):
    x = video(channels, dtype, device)
    x[:, :, 0, 0, 0] = 0
    gain, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    whole = torch.full((1, channels, 5, 4, 5), float("nan"), dtype=dtype, device=device).contiguous(
        memory_format=LAYOUT
    )
    for add in (None, bias):
        norm_silu(x, gain.view(-1, 1, 1, 1), whole[:, :, 2:], add)
        assert whole[:, :, :2].isnan().all() and relative(whole[:, :, 2:], normed(x, gain, add)) < TOLERANCES[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", [5, 96])
def test_add_biased(channels, dtype, device):
    y, other = video(channels, dtype, device), video(channels, dtype, device)
    bias = torch.randn(channels, device=device).to(dtype)
    want = y.double() + bias.double().view(-1, 1, 1, 1) + other.double()
    assert add_biased(y, bias, other) is y and relative(y, want) < TOLERANCES[dtype]


def test_another_layout_is_refused():
    x, bias = torch.randn(1, 4, 2, 3, 3), torch.randn(4)
    dense = x.contiguous(memory_format=LAYOUT)
    for call in (
        lambda: norm_silu(x, bias, dense),
        lambda: norm_silu(dense, bias, x),
        lambda: add_biased(x, bias, dense),
        lambda: add_biased(dense, bias, x),
    ):
        with pytest.raises(ValueError, match="Channels are not innermost"):
            call()


@interpreted.needed
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", [5, 96])
def test_kernels_interpreted(channels, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("channel_rows_triton")
    monkeypatch.setattr(kernel, "ELEMENTS", 2048)
    x, other = video(channels, dtype), video(channels, dtype)
    gain, bias = (torch.randn(channels).to(dtype) for _ in range(2))
    for add in (None, bias):
        out = torch.full_like(x, float("nan"))
        kernel.norm_silu(x.permute(0, 2, 3, 4, 1), gain, out.permute(0, 2, 3, 4, 1), add, eps=1e-12)
        assert relative(out, normed(x, gain, add)) < TOLERANCES[dtype]
    want = x.double() + bias.double().view(-1, 1, 1, 1) + other.double()
    kernel.add_biased(x.permute(0, 2, 3, 4, 1), bias, other.permute(0, 2, 3, 4, 1))
    assert relative(x, want) < TOLERANCES[dtype]
