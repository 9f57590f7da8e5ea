"""Contexts, attention and whole models against float64 forms of the authors' code; windows, guidance, layouts."""

from dataclasses import replace

import pytest
import torch
from contract import randomize
from layouts import Layout
from published import config, published, randomized, relative, velocity
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.clip_image.extension import ClipCond, ClipImageExtension
from wanvideo_wrapper.fantasytalking.extension import FantasyTalking, FantasyTalkingEmbeds
from wanvideo_wrapper.fantasytalking.frame_attention import FrameContext, cut, frame_context, latent_ranges
from wanvideo_wrapper.wanvideo.conditioning import Row, Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, ModelInputs, Text, Tokens

WIDTH = 10
SYSTEM = FantasyTalking(context_dim=WIDTH)
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=4)
scattered = Layout("permuted", 0, 0).place


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speech(frames=3, width=5, lengths=None, **more):
    lengths = lengths or [2 + i % (width - 1) for i in range(frames)]
    return FantasyTalkingEmbeds(context=rand(1, frames, width, WIDTH, seed=3), lengths=torch.tensor([lengths]), **more)


def inputs(payload=None, frames=3, batch=1, **more):
    payloads = () if payload is None else (payload,)
    text = tuple(rand(5, 20, seed=6 + i) for i in range(batch))
    return ModelInputs(latents=rand(batch, 16, frames, 4, 6, seed=5), timestep=torch.full((batch,), 500.0), text=text,
                       payloads=payloads, **more)  # fmt: skip


def heads_attend(q, k, v, heads):
    """q [L, C], k and v [T, C], float64."""
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], dim=-1)


def heard_float64(q, context, lengths, k_weight, v_weight, heads):
    """Each frame's queries [F * S, C] see its own speech, what is filling cut off; context [F, T, A] or [1, T, A]."""
    parts = zip(q.chunk(len(context)), context, lengths, strict=True)
    return torch.cat([heads_attend(own, c[:n] @ k_weight.T, c[:n] @ v_weight.T, heads) for own, c, n in parts])


def authors_split(tokens, frames, around):
    """The authors' rule, a latent frame at a time: (tokens that count, how many zeros behind them)."""
    rate = len(tokens) / frames
    half, middles = int(4 * rate / 2), []
    for latent in range(1, (frames - 1) // 4 + 1):
        middles.append(int((rate * (4 * latent - 3) + rate * (4 * latent + 1)) / 2) - 1)
    ranges = [(m - half, m + half) for m in middles]
    ranges.insert(0, (-(2 * half - ranges[0][0]), ranges[0][0]))
    found = []
    for first, last in ((a - around, b + around) for a, b in ranges):
        own = [tokens[i] for i in range(first, last + 1) if 0 <= i < len(tokens)]
        found.append((torch.stack(own), last - first + 1 - len(own)))
    return found


def test_ranges_of_the_authors_example():
    """81 frames whose speech has 173 tokens."""
    ranges = latent_ranges(173, 81)
    assert ranges[:3] == [(-7, 1), (1, 9), (9, 17)] and len(ranges) == 21
    assert {last - first for first, last in ranges} == {8}


@pytest.mark.parametrize(("count", "frames"), [(173, 81), (174, 81), (9, 5), (48, 25), (405, 81), (12, 9), (24 * 9, 9)])
@pytest.mark.parametrize("around", [0, 4])
def test_contexts_are_the_authors(count, frames, around):
    sequence = rand(1, count, 3)
    context, lengths = cut(sequence, frames, around)
    want = authors_split(sequence[0], frames, around)
    assert len(want) == context.shape[1]
    for got, n, (own, zeros) in zip(context[0], lengths[0], want, strict=True):
        assert len(got) == len(own) + zeros and n == len(own) > 0
        assert torch.equal(got[:n], own) and not got[n:].any()


def test_one_latent_frame_is_refused():
    with pytest.raises(ValueError, match="num_frames is 4: give at least 5"):
        cut(rand(1, 9, 3), 4)


def tokens_of(x, grid):
    return Tokens(x=x, mod=None, rows=None, rope=None, grid=grid, text=None, embedding=None, latents=None)


@torch.no_grad()
@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("form", ["frames", "all"])
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_cross_attention(image, form, extra, leading):
    """extra: tokens of others behind the video's; leading: references in front, which hear nothing."""
    model = randomize(WanModel(CONFIG, (ClipImageExtension(clip_dim=16), SYSTEM) if image else (SYSTEM,)))
    block, grid = model.blocks[0], (3 + leading, 2, 3)
    cross, count = block.cross_attn, (3 + leading) * 6
    x, text, picture = rand(2, count + extra, 24), rand(2, 4, 24, seed=1), rand(2, 7, 24, seed=2)
    payload = speech()
    context, lengths = payload.context, payload.lengths
    if form == "all":
        context, lengths = context[:, 0], lengths[:, 0]
    cond = frame_context(tokens_of(x, grid), context, scale=0.7, leading=leading, lengths=lengths)
    hooks = ((SYSTEM, cond),)
    if image:
        hooks = ((model.extensions[0], ClipCond(picture)), *hooks)
    got, _ = cross(x, BlockInputs(None, None, None, Text(text), grid), hooks, block)

    p = {k: v.double() for k, v in cross.state_dict().items()}

    def rms(name, t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]

    def linear(name, t):
        return t @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    first = 0 if form == "all" else leading * 6
    for row in range(2):
        q = rms("norm_q", linear("q", x[row].double()))
        words, seen = text[row].double(), picture[row].double()
        out = heads_attend(q, rms("norm_k", linear("k", words)), linear("v", words), 2)
        if image:
            out += heads_attend(q, rms("norm_k_img", linear("k_img", seen)), linear("v_img", seen), 2)
        own = context.double() if form == "all" else context[0].double()
        heard = heard_float64(
            q[first:count], own, lengths.flatten().tolist(), p["k_proj.weight"], p["v_proj.weight"], 2
        )
        out[first:count] += 0.7 * heard
        assert relative(got[row].double(), linear("o", out)) < 1e-5


class Hearing:
    """Diffusers' text cross-attention with the authors' speech attention before the output projection."""

    def __init__(self, k, v, payload):
        self.k, self.v, self.payload = k.double(), v.double(), payload

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        rows = []
        for x, text in zip(hidden_states, encoder_hidden_states, strict=True):
            q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
            context, lengths = self.payload.context[0].double(), self.payload.lengths[0].tolist()
            heard = heard_float64(q, context, lengths, self.k, self.v, attn.heads)
            rows.append(heads_attend(q, k, v, attn.heads) + self.payload.scale * heard)
        return attn.to_out[0](torch.stack(rows))


def with_system():
    model = randomized(WanModel(config(), (SYSTEM,)))
    own = tuple(f"blocks.{i}.cross_attn.{name}_proj" for i in range(2) for name in "kv")
    return model, published(model, *own).double()


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 4])
def test_the_whole_model_is_diffusers_with_the_authors_attention(frames):
    model, reference = with_system()
    payload = speech(frames, scale=0.7)
    for block, own in zip(reference.blocks, model.blocks, strict=True):
        block.attn2.processor = Hearing(own.cross_attn.k_proj.weight, own.cross_attn.v_proj.weight, payload)
    given = inputs(payload, frames, batch=2)
    wide = replace(given, text=tuple(t.double() for t in given.text))
    assert relative(model(given).double(), velocity(reference, given.latents.double(), wide)) < 1e-5


@torch.no_grad()
def test_filling_does_not_count():
    model, _ = with_system()
    payload = speech()
    other = payload.context.clone()
    for frame, n in zip(other[0], payload.lengths[0].tolist(), strict=True):
        frame[n:] += 10
    want = model(inputs(payload))
    torch.testing.assert_close(model(inputs(replace(payload, context=other))), want)
    heard = replace(payload, context=other, lengths=torch.full((1, 3), 5))
    assert relative(model(inputs(heard)), want) > 1e-2


@torch.no_grad()
def test_strength_of_each_step():
    model, _ = with_system()
    listed = speech(scale=(0.0, 0.5, 1.5))
    for step, scale in enumerate((0.0, 0.5, 1.5, 1.5)):
        step = Step(index=4 + step, total=9, in_run=step)
        want = model(inputs(speech(scale=scale), step=step)) if scale else model(inputs(step=step))
        assert torch.equal(model(inputs(listed, step=step)), want)


@torch.no_grad()
def test_a_window_hears_what_its_frames_say():
    model, _ = with_system()
    whole = speech(6)
    part = whole.window(Window(latents=(2, 4, 5), pixels=(), total=6))
    alone = replace(whole, context=whole.context[:, [2, 4, 5]], lengths=whole.lengths[:, [2, 4, 5]])
    assert torch.equal(model(inputs(part)), model(inputs(alone)))
    # A reference at either end: the video's frames are the ones between.
    part = whole.window(Window(latents=(0, 3, 4, 7), pixels=(), leading=1, trailing=1, total=8))
    assert part.leading == 1 and torch.equal(part.context, whole.context[:, 2:4])
    assert torch.equal(part.lengths, whole.lengths[:, 2:4])
    flat = replace(whole, context=whole.context[:, 0], lengths=whole.lengths[:, 0])
    assert flat.window(Window(latents=(2, 4, 5), pixels=(), total=6)) is flat


@pytest.mark.parametrize(
    ("window", "frames"),
    [
        (Window(latents=(0, 1), pixels=(), total=4), 4),
        (Window(latents=(0, 1, 2), pixels=(), leading=1, total=5), 4),
        (Window(latents=(2, 3), pixels=()), 4),
    ],
)
def test_speech_that_ends_before_the_video_is_refused(window, frames):
    with pytest.raises(ValueError, match=rf"made speech for 3 latent frames, but the video has {frames}"):
        speech(3).window(window)


def test_what_does_not_fit_is_named():
    model, _ = with_system()
    with pytest.raises(ValueError, match="speech of 10 channels but FantasyTalkingWav2VecEmbeds gives 9"):
        model(inputs(replace(speech(), context=rand(1, 3, 5, 9))))
    with pytest.raises(ValueError, match="for 4 latent frames, but the video has 3"):
        model(inputs(speech(4)))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("cfg_scale", [4.0, (1.0, 2.5), 1.0])
def test_guidance_is_the_authors_formula(scale, cfg_scale):
    model, _ = with_system()
    payload = speech(cfg_scale=cfg_scale)
    positive, negative = rand(5, 20, seed=6), rand(5, 20, seed=9)
    latents, step = rand(16, 3, 4, 6, seed=5), Step(index=1, total=4, in_run=1)
    denoise = Denoiser(
        model,
        Conditions(positive=positive, negative=negative, payloads=(payload,)),
        guidance=Guidance(cfg=(scale,), payloads=(payload,)),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    got = denoise(latents, torch.tensor(500.0), step)

    def passed(text, *payloads):
        return model(replace(inputs(), text=(text,), payloads=payloads))[0].double()

    audio = cfg_scale if isinstance(cfg_scale, float) else cfg_scale[1]
    if audio == 1.0:
        nothing, everything = passed(negative, payload), passed(positive, payload)
        want = nothing + scale * (everything - nothing)
    else:
        nothing, silent, everything = passed(negative), passed(positive), passed(positive, payload)
        want = nothing + scale * (silent - nothing) + audio * (everything - silent)
    assert relative(got.double(), want) < 1e-5


def test_passes_of_guidance():
    rows = speech(cfg_scale=4.0).guidance(1.0, Step())
    assert rows == (Row(4.0), Row(-3.0, frozenset({"audio"})), Row(0.0, frozenset({"text", "audio"})))
    assert speech().guidance(5.0, Step()) is None
    assert speech().without(frozenset({"audio"})) is None and speech().without(frozenset({"text"})) is not None


def test_keys_of_others_are_not_taken():
    shapes = {
        "proj_model.norm.weight": (4,),
        "proj_model.eye_proj.weight": (4, 6),
        "blocks.0.cross_attn.k.weight": (4, 4),
    }
    assert not any(SYSTEM.owns(key) for key in shapes) and FantasyTalking.detect(shapes) is None
    assert SYSTEM.owns("proj_model.proj.weight")


class LooseAttention:
    """Requires what kernels do, and gives memory of another order."""

    def __call__(self, q, k, v, *, mask=None):
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        return scattered(sdpa()(q, k, v, mask=mask))


@torch.no_grad()
def test_every_linear_layer_reads_dense_rows():
    """Whatever memory tokens, speech, projections and attention give."""
    model, dense = randomize(WanModel(CONFIG, (SYSTEM,))), []
    block, grid = model.blocks[0], (3, 2, 3)
    cross, payload = block.cross_attn, speech()
    x, inside = rand(2, 22, 24), BlockInputs(None, None, None, Text(rand(2, 4, 24, seed=1)), grid)

    def run(x, context):
        cond = frame_context(tokens_of(x, grid), context, scale=0.7, leading=0, lengths=payload.lengths)
        assert cond.tokens.is_contiguous() and cond.mask.is_contiguous()
        return cross(x, inside, ((SYSTEM, cond),), block)[0]

    want = run(x, payload.context)
    for name in ("k_proj", "v_proj", "o"):
        layer = getattr(cross, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: dense.append((name, given[0].is_contiguous())))
    for name in ("q", "k_proj", "v_proj"):
        getattr(cross, name).register_forward_hook(lambda _, __, out: scattered(out))
    cross.attention = LooseAttention()
    torch.testing.assert_close(run(x, scattered(payload.context)), want, rtol=1e-4, atol=1e-5)
    assert dense == [("k_proj", True), ("v_proj", True), ("o", True)]


def test_speech_of_a_batch_is_its_own_memory():
    cond = frame_context(tokens_of(rand(2, 18, 24), (3, 2, 3)), speech().context, scale=1.0, leading=0)
    assert isinstance(cond, FrameContext) and cond.mask is None
    assert cond.tokens.is_contiguous() and torch.equal(cond.tokens[:3], cond.tokens[3:])
