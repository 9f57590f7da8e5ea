"""The most memory that a forward holds, counted at the true sizes of the 14B model, two blocks deep.

A block frees what it made, so that two have the peak of forty. Limits are per token and channel of a bfloat16
activation: they are what fits beside the weights on a small card, and break where somebody holds on to a tensor.
"""

import pytest
import torch
from memory_count import GIB, GOALS, ROUTES, SIZES, LiveBytes, controlnet, peaks, uni3c
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.memory import Work, footprint
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

# What kernels need beside tensors: cuBLAS' workspace, and cuDNN's with the tables of its graph.
WORKSPACES = 2**26


@pytest.mark.parametrize(
    ("name", "route", "gib"),
    [("480p", "fp8", 2.48), ("720p", "fp8", 4.02), ("infinitetalk", "fp8", 3.36), ("480p", "bf16", 3.64)],
)
def test_peaks_of_a_swapped_14b_model(name, route, gib, monkeypatch):
    """All blocks through two slabs, as docs/memory.md says; the arithmetic behind `plan` is within a tenth of it."""
    size, more, goal = GOALS[name]
    attention, precision = ROUTES[route]
    activations, outside, block, unit = peaks(monkeypatch, size, attention=attention, fp8=route == "fp8", **more)
    tensors = activations + outside + 2 * block
    assert tensors / GIB == pytest.approx(gib, abs=0.02)
    counted = tensors + WORKSPACES
    config, work = WanConfig(**SIZES, in_dim=more.get("in_dim", 16)), Work(21 * size[0] * size[1] // 256)
    expected = footprint(config, (block,) * 40, outside, work=work, precision=precision).peak(40)
    assert expected == pytest.approx(counted, rel=0.1)
    if route == "fp8":
        assert counted < 0.95 * goal * GIB and activations < 5.2 * unit


@pytest.mark.parametrize("name", ["480p", "720p"])
@pytest.mark.parametrize("made", [uni3c, controlnet])
def test_a_model_beside_a_swapped_one_adds_two_slabs_and_its_stream(made, name, monkeypatch):
    """Its stream is narrower than the transformer's; the 2.3 GB of Uni3C's weights would break the limits."""
    size, _, gib = GOALS[name]
    extension, payloads, turn = made(size)
    activations, outside, block, unit = peaks(
        monkeypatch, size, extensions=(extension,), payloads=payloads, attention=CudnnFp8()
    )
    plain, *_ = peaks(monkeypatch, size, attention=CudnnFp8())
    assert 0 < activations - plain < 0.36 * unit and turn < 1.3e8
    assert activations + outside + 2 * (block + turn) + WORKSPACES < gib * GIB


@pytest.mark.parametrize(("fp8", "units"), [(True, 5.7), (False, 6.2)], ids=["fp8", "bf16"])
def test_plain_attention_in_pieces(fp8, units, monkeypatch):
    """q, k and v in 16 bits, and the residual stream: the hidden layer is not what sets the peak."""
    activations, *_, unit = peaks(monkeypatch, (720, 1280), attention=sdpa(), fp8=fp8)
    assert activations < units * unit


@pytest.mark.parametrize(("fp8", "units"), [(True, 7.7), (False, 9.5)], ids=["fp8", "bf16"])
def test_all_tokens_at_once(fp8, units, monkeypatch):
    """One residual stream and its copy beside the hidden layer, before and behind the GELU, and no stale tensor."""
    activations, *_, unit = peaks(monkeypatch, (480, 832), attention=sdpa(), fp8=fp8, spare=False)
    assert activations < units * unit


@torch.no_grad()
def test_nothing_is_kept_of_a_forward():
    """Keys and values of the text would be a gigabyte, for 0.2 % of the time."""
    model = WanModel(WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=6))
    text = (torch.randn(3, 8),)

    def asked(time):
        return ModelInputs(latents=torch.randn(1, 16, 2, 4, 4), timestep=torch.tensor([time]), text=text)

    inputs = asked(200.0)
    with LiveBytes() as live:
        live.ignore((*model.parameters(), *model.buffers(), inputs.latents, inputs.timestep, *text))
        out = model(inputs)
        assert live.now > 0 and out.isfinite().all()
        del out
    # Positions of a grid are remembered: 8 tokens, 16 angles, cosine and sine.
    assert live.now == 8 * 16 * 2 * 4
