"""Several prompts in one video, against cross-attention computed segment by segment from its definition."""

from __future__ import annotations

import pytest
import torch
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.prompt_segments.extension import PromptSegments, PromptSegmentsExtension, frame_ranges
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs, Text, Tokens

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)


def model_of(*extensions):
    torch.manual_seed(3)
    model = WanModel(CONFIG, extensions).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompt(seed, tokens=3):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def inputs(text, *payloads, frames=5, batch=1):
    latents = torch.randn(1, 16, frames, 4, 4, generator=torch.Generator().manual_seed(5)).expand(batch, -1, -1, -1, -1)
    return ModelInputs(latents=latents, timestep=torch.full((batch,), 500.0), text=(text,) * batch, payloads=payloads)


@pytest.mark.parametrize(
    ("frames", "prompts", "ranges"),
    [(6, 3, ((0, 2), (2, 4), (4, 6))), (7, 2, ((0, 3), (3, 7))), (2, 3, ((0, 1), (1, 2), (2, 2))), (4, 1, ((0, 4),))],
)
def test_frames_are_shared_out(frames, prompts, ranges):
    assert frame_ranges(frames, prompts) == ranges


def test_segments_attend_to_their_own_prompt():
    """Against the block's plain cross-attention, run once for every prompt."""
    extension = PromptSegmentsExtension()
    model = model_of(extension)
    block, texts = model.blocks[0].double(), [prompt(seed) for seed in (1, 2, 3)]
    model.text_embedding.double()
    x = torch.randn(2, 5 * 4, 24, dtype=torch.float64)
    first = Text(model.embed_text([texts[0]] * 2, torch.float64))
    tokens = Tokens(x, torch.zeros(1), None, torch.zeros(1), (5, 2, 2), first, torch.zeros(1), torch.zeros(1))
    tokens, _ = extension.prepare(model, PromptSegments(tuple(texts[1:])), None, tokens)
    cross = block.cross_attn

    def attend(text):
        q, k, v = cross.norm_q(cross.q(x)), cross.norm_k(cross.k(text)), cross.v(text)
        q, k, v = (t.unflatten(-1, (2, 12)).transpose(1, 2) for t in (q, k.expand(2, -1, -1), v.expand(2, -1, -1)))
        out = ((q @ k.transpose(-1, -2)) / 12**0.5).softmax(-1) @ v
        return q.transpose(1, 2), out.transpose(1, 2)

    answers = [attend(model.embed_text([text], torch.float64)) for text in texts]
    q, alone = answers[0]
    got = tokens.text.attend(cross, q)
    want = torch.cat([answers[0][1][:, :4], answers[1][1][:, 4:8], answers[2][1][:, 8:]], dim=1)
    torch.testing.assert_close(got, want)
    assert (alone - want).abs().max() > 1e-3


def test_equal_prompts_change_nothing_and_others_do():
    model, text = model_of(PromptSegmentsExtension()), prompt(1)
    plain = model(inputs(text))
    torch.testing.assert_close(model(inputs(text, PromptSegments((text, text)))), plain, rtol=1e-4, atol=1e-4)
    changed = model(inputs(text, PromptSegments((prompt(2),))))
    assert (changed - plain).abs().max() > 1e-3


def test_prompts_without_frames_are_left_out():
    model, text = model_of(PromptSegmentsExtension()), prompt(1)
    assert torch.equal(model(inputs(text, PromptSegments((prompt(2),)), frames=1)), model(inputs(text, frames=1)))


def test_batch_and_image_attention():
    """CLIP attention is added after the prompts were shared out, whatever the batch."""
    model, text = model_of(PromptSegmentsExtension(), ClipImageExtension(clip_dim=6)), prompt(1)
    payloads = (PromptSegments((prompt(2),)), ClipImage(torch.randn(1, 5, 6)))
    one = model(inputs(text, *payloads))
    torch.testing.assert_close(model(inputs(text, *payloads, batch=2)), one.expand(2, -1, -1, -1, -1))
    assert (one - model(inputs(text, payloads[0]))).abs().max() > 1e-3


def test_found_in_every_wan_model():
    shapes = {key: tuple(value.shape) for key, value in model_of().state_dict().items()}
    assert PromptSegmentsExtension() in SYSTEMS.detect(shapes)


def test_compiled_block_equals_eager():
    model, text = model_of(PromptSegmentsExtension()), prompt(1)
    asked = inputs(text, PromptSegments((prompt(2), prompt(3))))
    want = model(asked)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(asked), want, rtol=1e-4, atol=1e-4)


def test_unlike_prompts_do_not_stack():
    segments = PromptSegments((prompt(2),))
    assert segments.stack([segments]) is segments
    with pytest.raises(ValueError, match="batched_cfg"):
        segments.stack([PromptSegments((prompt(3),))])
