"""Normalized attention guidance against its published formula in float64, in both forms of cross-attention."""

from dataclasses import replace

import pytest
import torch
from contract import build, inputs
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.nag.extension import NegativeText, NormalizedAttentionGuidance, Strength, guided
from wanvideo_wrapper.nag.nodes import WanVideoApplyNAG
from wanvideo_wrapper.prompt_segments.extension import PromptSegments, PromptSegmentsExtension
from wanvideo_wrapper.tensor_layout import is_kernel_ready
from wanvideo_wrapper.vace.extension import Vace, VaceContext, VaceExtension
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.request import TextEmbeds

NAG = NormalizedAttentionGuidance()
HEADS, HEAD = 2, 12


def prompt(seed, tokens=3):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def payload(*prompts, scale=8.0, tau=1.7, alpha=0.4, inplace=True):
    return NegativeText(prompts or (prompt(9),), *(torch.tensor(v) for v in (scale, tau, alpha)), inplace)


def published(positive, negative, scale, tau, alpha):
    """The authors' form: the extrapolation is cut to `tau` times the size of the positive output."""
    pushed = positive * scale - negative * (scale - 1)
    ratio = pushed.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    pushed = pushed * ratio.clamp(max=tau) / ratio
    return pushed * alpha + positive * (1 - alpha)


def attention(cross, x, text):
    """Text cross-attention from its definition, before the output projection: [B, L, C]."""
    q, k, v = cross.norm_q(cross.q(x)), cross.norm_k(cross.k(text)), cross.v(text)
    k, v = (t.expand(len(x), -1, -1) for t in (k, v))
    q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in (q, k, v))
    return (((q @ k.transpose(-1, -2)) / HEAD**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("tau", [0.9, 3.0, 50.0])
def test_formula(inplace, tau):
    positive, negative = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    strength = Strength(*(torch.tensor(v) for v in (6.5, tau, 0.3)))
    want = published(positive, negative, 6.5, tau, torch.tensor(0.3).double())
    given = (positive.clone(), negative.clone())
    got = guided(*given, strength, inplace=inplace)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(given[0], positive) and torch.equal(given[1], negative) == (not inplace)


def test_some_tokens_are_cut_and_others_not():
    positive, negative = torch.randn(1, 400, 24), torch.randn(1, 400, 24)
    pushed = positive * 2.0 - negative
    ratio = pushed.abs().sum(-1) / positive.abs().sum(-1)
    assert 0.2 < (ratio > 2.2).float().mean() < 0.8
    got = guided(positive, negative.clone(), Strength(*map(torch.tensor, (2.0, 2.2, 1.0))), inplace=True)
    size = got.abs().sum(-1) / positive.abs().sum(-1)
    torch.testing.assert_close(size, ratio.clamp(max=2.2), rtol=1e-4, atol=1e-4)


def test_silence_gives_no_nan():
    positive = torch.zeros(1, 2, 24)
    strength = Strength(*map(torch.tensor, (3.0, 2.5, 0.25)))
    assert not guided(positive, torch.zeros(1, 2, 24), strength, inplace=True).any()
    assert guided(positive, torch.randn(1, 2, 24), strength, inplace=False).isfinite().all()


def test_half_precision_norms_do_not_overflow():
    positive, negative = torch.randn(1, 3, 5120) * 40, torch.randn(1, 3, 5120) * 40
    strength = Strength(*map(torch.tensor, (11.0, 2.5, 0.25)))
    got = guided(positive.half(), negative.half(), strength, inplace=True)
    want = guided(positive, negative, strength, inplace=True)
    assert ((got.float() - want).norm() / want.norm()).item() < 0.01


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("form", ["text", "image"])
def test_cross_attention(form, inplace):
    """Of a whole cross-attention module; the image's part is added behind, and is not guided."""
    more = (ClipImageExtension(clip_dim=6),) if form == "image" else ()
    _, model = build(NAG, *more)
    model.double()
    block = model.blocks[1]
    cross, seen = block.cross_attn, []
    handle = cross.register_forward_hook(lambda module, args, out: seen.append((args, out[0])))
    asked = inputs(payload(inplace=inplace), *([ClipImage(torch.randn(1, 5, 6))] if more else []), batch=2)
    model(asked)
    handle.remove()
    (x, block_inputs, hooks, _), got = seen[0]
    text = model.embed_text(asked.text, torch.float64)
    negative = model.embed_text([prompt(9)], torch.float64)
    strength = [torch.tensor(v).double() for v in (8.0, 1.7, 0.4)]
    want = published(attention(cross, x, text), attention(cross, x, negative), *strength)
    if more:
        ((_, cond),) = [(e, c) for e, c in hooks if isinstance(e, ClipImageExtension)]
        q = cross.norm_q(cross.q(x))
        k, v = cross.norm_k_img(cross.k_img(cond.tokens)), cross.v_img(cond.tokens)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in (q, k, v))
        want = want + (((q @ k.transpose(-1, -2)) / HEAD**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, cross.o(want), rtol=1e-6, atol=1e-6)
    assert (got - cross.o(attention(cross, x, text))).abs().max() > 1e-3


def test_inplace_and_not_agree():
    _, model = build(NAG)
    one, other = model(inputs(payload())), model(inputs(payload(inplace=False)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_several_negative_prompts_are_attended_to_together():
    _, model = build(NAG)
    model.double()
    cross, x = model.blocks[0].cross_attn, torch.randn(1, 7, 24, dtype=torch.float64)
    q = cross.split(cross.norm_q(cross.q(x)))
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[1].text))
    model(inputs(payload(prompt(1), prompt(2, tokens=4))))
    handle.remove()
    both = torch.cat(model.embed_text([prompt(1), prompt(2, tokens=4)], torch.float64).unbind()).unsqueeze(0)
    torch.testing.assert_close(seen[0].negative, both)
    strength = [torch.tensor(v).double() for v in (8.0, 1.7, 0.4)]
    want = published(attention(cross, x, seen[0].positive.tokens), attention(cross, x, both), *strength)
    torch.testing.assert_close(seen[0].attend(cross, q).flatten(2), want, rtol=1e-6, atol=1e-6)


def test_each_segment_is_guided():
    """With a negative prompt that equals the second of two, its half of the frames is not pushed."""
    _, model = build(PromptSegmentsExtension(), NAG)
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append((args[0], args[1].text)))
    model(inputs(PromptSegments((prompt(4, tokens=4),)), payload(prompt(4, tokens=4), tau=100.0, alpha=1.0)))
    handle.remove()
    (x, text), cross = seen[0], model.blocks[0].cross_attn
    q = cross.split(cross.norm_q(cross.q(x)))
    got, plain = text.attend(cross, q), text.positive.attend(cross, q)
    assert type(text.positive).__name__ == "SegmentedText"
    torch.testing.assert_close(got[:, 4:], plain[:, 4:], rtol=1e-3, atol=1e-4)
    assert (got[:, :4] - plain[:, :4]).abs().max() > 1e-2


def test_it_acts_in_blocks_of_other_systems():
    """The text of a VACE block is guided by that block's own keys and values."""
    _, model = build(NAG, VaceExtension(blocks=2))
    model.double()
    cross, seen = model.vace_blocks[1].cross_attn, []
    handle = cross.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    asked = inputs(payload(), Vace((VaceContext(latents=torch.randn(1, 96, 3, 4, 4)),)))
    model(asked)
    handle.remove()
    x, got = seen[0]
    text, negative = model.embed_text(asked.text, torch.float64), model.embed_text([prompt(9)], torch.float64)
    strength = [torch.tensor(v).double() for v in (8.0, 1.7, 0.4)]
    want = published(attention(cross, x, text), attention(cross, x, negative), *strength)
    torch.testing.assert_close(got, cross.o(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_beside_cfg_it_acts_in_passes_with_the_prompt_alone(batched):
    _, model = build(NAG)
    guidance = payload()
    latents, positive, negative = torch.randn(16, 3, 4, 4), prompt(1, tokens=4), prompt(2, tokens=4)
    denoiser = Denoiser(
        model, Conditions(positive=positive, negative=negative, payloads=(guidance,)),
        guidance=Guidance(cfg=(3.0,), payloads=(guidance,), batched=batched), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    got = denoiser(latents, torch.tensor(500.0), Step())
    common = replace(inputs(), latents=latents[None])
    one = model(replace(common, text=(positive,), payloads=(guidance,)))
    other = model(replace(common, text=(negative,)))
    torch.testing.assert_close(got, (other + 3.0 * (one - other))[0], rtol=1e-4, atol=1e-4)


def loose(q, k, v):
    """Attention whose output has gaps between its rows, so that heads and channels join into a view."""
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    out = sdpa()(q, k, v)
    wide = out.new_zeros(*out.shape[:2], out.shape[2] + 1, out.shape[3])
    return wide[:, :, :-1].copy_(out)


def test_values_reach_the_output_projection_densely():
    _, model = build(NAG)
    seen = []
    for block in model.blocks:
        block.cross_attn.attention = loose
        block.cross_attn.o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(inputs(payload(), batch=2))
    model(inputs(payload(inplace=False), batch=2))
    assert len(seen) == 6 and all(is_kernel_ready(x, strided=False) for x in seen)


def embeds(seed, *payloads):
    return TextEmbeds(positive=(prompt(seed),), negative=(prompt(seed + 1),), payloads=payloads)


def test_node():
    segments = PromptSegments((prompt(3),))
    (first,) = WanVideoApplyNAG().process(embeds(1, segments), embeds(5), 11.0, 2.5, 0.25)
    (second,) = WanVideoApplyNAG().process(first, embeds(7), 4.0, 2.0, 0.5, inplace=False)
    assert torch.equal(first.positive[0], prompt(1)) and torch.equal(first.negative[0], prompt(2))
    kept, guidance = first.payloads
    assert kept is segments and torch.equal(guidance.prompts[0], prompt(5)) and guidance.inplace
    assert [v.item() for v in (guidance.scale, guidance.tau, guidance.alpha)] == [11.0, 2.5, 0.25]
    kept, guidance = second.payloads
    assert kept is segments and torch.equal(guidance.prompts[0], prompt(7)) and not guidance.inplace
    with pytest.raises(ValueError, match="nag_text_embeds hold no prompt"):
        WanVideoApplyNAG().process(first, TextEmbeds(positive=()), 11.0, 2.5, 0.25)


def test_every_window_is_guided():
    guidance = payload()
    assert guidance.window(None) is guidance and guidance.without(frozenset({"audio"})) is guidance
    assert guidance.without(frozenset({"text", "audio"})) is None
