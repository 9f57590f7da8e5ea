"""The most memory that a forward holds, counted at the true sizes of the 14B model, two blocks deep.

A block frees what it made, so that two have the peak of forty. Limits are per token and channel of a bfloat16
activation: they are what fits beside the weights on a small card, and break where somebody holds on to a tensor.
"""

import pytest
import torch
from memory_count import GIB, LiveBytes, give_fake_weights, shapes_of, weightless
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

SIZES = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2)
AT_ONCE, BLOCKS = 8192, 40


def peaks(monkeypatch, size, *, extensions=(), payloads=lambda: (), in_dim=16, attention=None, fp8=True, spare=True):
    """Bytes of activations at the peak, and of all parameters that are outside blocks, and of one block."""
    model = shapes_of(WanConfig(**SIZES, in_dim=in_dim), extensions, attention=attention, fp8=fp8)
    block = sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters())
    with weightless(monkeypatch), LiveBytes() as live:
        live.ignore(give_fake_weights(model))
        frames, height, width = 21, size[0] // 8, size[1] // 8
        given = ModelInputs(
            latents=torch.empty(1, 16, frames, height, width), timestep=torch.empty(1),
            text=(torch.empty(200, 4096, dtype=torch.bfloat16),), payloads=payloads(),
        )  # fmt: skip
        start = live.now
        with model.sparing(AT_ONCE if spare else 0):
            model(given)
    blocks = sum(p.nbytes for stack in model.stacks().values() for p in stack.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - blocks
    return live.peak - start, outside, block, frames * height * width // 4 * SIZES["dim"] * 2


def talking(size):
    frames, height, width = 21, size[0] // 8, size[1] // 8
    return lambda: (
        ImageCondition(
            torch.empty(1, 16, frames, height, width, dtype=torch.bfloat16),
            torch.empty(1, 4, frames, height, width, dtype=torch.bfloat16),
        ),
        ClipImage(torch.empty(1, 257, 1280, dtype=torch.bfloat16)),
        AudioWindow(torch.empty(1, 1, 81, 5, 12, 768, dtype=torch.bfloat16), torch.empty(())),
    )


SPEECH = (
    ImageToVideo(),
    ClipImageExtension(clip_dim=1280),
    MultiTalk(features=12 * 768, intermediate_dim=512, context_tokens=32, output_dim=768, voiced=(0, 1)),
)
GOALS = {
    "480p": ((480, 832), {}, 3.2),
    "720p": ((720, 1280), {}, 4.6),
    "infinitetalk": ((768, 768), dict(extensions=SPEECH, payloads=talking((768, 768)), in_dim=36), 4.0),
}
# What kernels need beside tensors: cuBLAS' workspace, and cuDNN's with the tables of its graph.
WORKSPACES = 2**26


@pytest.mark.parametrize("name", GOALS)
def test_a_swapped_14b_model_fits(name, monkeypatch):
    """FP8 weights and products, cuDNN's FP8 attention, all blocks swapped through two slabs."""
    size, more, gib = GOALS[name]
    activations, outside, block, unit = peaks(monkeypatch, size, attention=CudnnFp8(), **more)
    assert activations + outside + 2 * block + WORKSPACES < 0.95 * gib * GIB
    assert activations < 5.2 * unit


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
