"""Attention to motion and whole models against float64 forms of the authors' code; windows, steps, guidance."""

from dataclasses import replace

import pytest
import torch
from contract import randomize
from layouts import Layout
from published import config, published, randomized, relative, velocity
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.clip_image.extension import ClipCond, ClipImageExtension
from wanvideo_wrapper.fantasyportrait.extension import K_PROJ, V_PROJ, FantasyPortrait, PortraitMotion
from wanvideo_wrapper.fantasytalking.extension import FantasyTalking, FantasyTalkingEmbeds
from wanvideo_wrapper.fantasytalking.frame_attention import frame_context
from wanvideo_wrapper.wanvideo.conditioning import Row, Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, ModelInputs, Text, Tokens

WIDTH = 10
SYSTEM = FantasyPortrait(context_dim=WIDTH)
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=4)
scattered = Layout("permuted", 0, 0).place


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def motion(frames=3, **more):
    return PortraitMotion(context=rand(1, frames, 5, WIDTH, seed=3), **more)


def inputs(*payloads, frames=3, **more):
    return ModelInputs(latents=rand(1, 16, frames, 4, 6, seed=5), timestep=torch.tensor([500.0]),
                       text=(rand(5, 20, seed=6),), payloads=payloads, **more)  # fmt: skip


def heads_attend(q, k, v, heads):
    """q [L, C], k and v [T, C], float64."""
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], dim=-1)


def moved_float64(q, context, k_weight, v_weight, heads):
    """Each frame's queries [F * S, C] see all of its own motion, the zeros of the filling too."""
    pairs = zip(q.chunk(len(context)), context, strict=True)
    return torch.cat([heads_attend(own, c @ k_weight.T, c @ v_weight.T, heads) for own, c in pairs])


def tokens_of(x, grid):
    return Tokens(x=x, mod=None, rows=None, rope=None, grid=grid, text=None, embedding=None, latents=None)


@torch.no_grad()
@pytest.mark.parametrize("form", ["frames", "all"])
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_cross_attention(image, form):
    """A reference in front and tokens of others behind do not move; without frames, all tokens of the video do."""
    model = randomize(WanModel(CONFIG, (ClipImageExtension(clip_dim=16), SYSTEM) if image else (SYSTEM,)))
    block, grid = model.blocks[0], (4, 2, 3)
    cross, x = block.cross_attn, rand(2, 28, 24)
    text, picture, context = rand(2, 4, 24, seed=1), rand(2, 7, 24, seed=2), motion().context
    context = context if form == "frames" else context[:, 0]
    cond = frame_context(tokens_of(x, grid), context, scale=0.7, leading=1)
    hooks = ((SYSTEM, cond),)
    if image:
        hooks = ((model.extensions[0], ClipCond(picture)), *hooks)
    got, _ = cross(x, BlockInputs(None, None, None, Text(text), grid), hooks, block)
    p = {k: v.double() for k, v in cross.state_dict().items()}

    def rms(name, t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]

    def linear(name, t):
        return t @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    first = 6 if form == "frames" else 0
    for row in range(2):
        q = rms("norm_q", linear("q", x[row].double()))
        words, seen = text[row].double(), picture[row].double()
        out = heads_attend(q, rms("norm_k", linear("k", words)), linear("v", words), 2)
        if image:
            out += heads_attend(q, rms("norm_k_img", linear("k_img", seen)), linear("v_img", seen), 2)
        own = context[0].double() if form == "frames" else context.double()
        out[first:24] += 0.7 * moved_float64(q[first:24], own, p[f"{K_PROJ}.weight"], p[f"{V_PROJ}.weight"], 2)
        assert relative(got[row].double(), linear("o", out)) < 1e-5


class Moving:
    """Diffusers' text cross-attention with the authors' attention to motion before the output projection."""

    def __init__(self, cross, payload):
        self.k, self.v = (getattr(cross, name).weight.double() for name in (K_PROJ, V_PROJ))
        self.payload = payload

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        rows = []
        for x, text in zip(hidden_states, encoder_hidden_states, strict=True):
            q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
            added = moved_float64(q, self.payload.context[0].double(), self.k, self.v, attn.heads)
            rows.append(heads_attend(q, k, v, attn.heads) + self.payload.strength * added)
        return attn.to_out[0](torch.stack(rows))


def with_system():
    return randomized(WanModel(config(), (SYSTEM,)))


@torch.no_grad()
def test_the_whole_model_is_diffusers_with_the_authors_attention():
    model, payload = with_system(), motion(strength=0.7)
    own = tuple(f"blocks.{i}.cross_attn.ip_adapter" for i in range(2))
    reference = published(model, *own).double()
    for block, ours in zip(reference.blocks, model.blocks, strict=True):
        block.attn2.processor = Moving(ours.cross_attn, payload)
    given = inputs(payload)
    wide = replace(given, text=tuple(t.double() for t in given.text))
    assert relative(model(given).double(), velocity(reference, given.latents.double(), wide)) < 1e-5


@torch.no_grad()
def test_speech_and_motion_add_up():
    """Both systems change the heads of one attention; neither sees the other."""
    hears = FantasyTalking(context_dim=6)
    model = randomize(WanModel(CONFIG, (hears, SYSTEM)))
    speech = FantasyTalkingEmbeds(context=rand(1, 3, 4, 6, seed=8), lengths=torch.tensor([[2, 4, 3]]))
    block, x, grid = model.blocks[0], rand(1, 18, 24), (3, 2, 3)
    tokens, inside = tokens_of(x, grid), BlockInputs(None, None, None, Text(rand(1, 4, 24, seed=1)), grid)
    heard = (hears, frame_context(tokens, speech.context, scale=1.0, leading=0, lengths=speech.lengths))
    moved = (SYSTEM, frame_context(tokens, motion().context, scale=1.0, leading=0))
    none, one, other, both = (
        block.cross_attn(x, inside, hooks, block)[0] for hooks in ((), (heard,), (moved,), (heard, moved))
    )
    torch.testing.assert_close(both, one + other - none, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("index", "acts"), [(0, False), (1, False), (2, True), (4, True), (6, True), (7, False)])
def test_it_acts_in_its_steps(index, acts):
    model, payload = with_system(), motion(start=0.25, end=0.75)
    step = Step(index=index, total=8, in_run=index)
    same = torch.equal(model(inputs(payload, step=step)), model(inputs(step=step)))
    assert same == (not acts)


@torch.no_grad()
def test_a_window_moves_as_its_frames_do():
    model, whole = with_system(), motion(6)
    part = whole.window(Window(latents=(2, 4, 5), pixels=(), total=6))
    alone = replace(whole, context=whole.context[:, [2, 4, 5]])
    assert torch.equal(model(inputs(part)), model(inputs(alone)))
    part = whole.window(Window(latents=(0, 3, 4, 7), pixels=(), leading=1, trailing=1, total=8))
    assert part.leading == 1 and torch.equal(part.context, whole.context[:, 2:4])
    with pytest.raises(ValueError, match="found motion for 6 latent frames, but the video has 7"):
        whole.window(Window(latents=(0, 1), pixels=(), total=7))
    held = whole.window(Window(latents=(4, 5, 6, 7), pixels=()))
    assert torch.equal(held.context, whole.context[:, [4, 5, 5, 5]])


def test_what_does_not_fit_is_named():
    model = with_system()
    with pytest.raises(ValueError, match="motion of 10 channels but FantasyPortraitFaceDetector gives 9"):
        model(inputs(replace(motion(), context=rand(1, 3, 5, 9))))
    with pytest.raises(ValueError, match="for 4 latent frames, but the video has 3"):
        model(inputs(motion(4)))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("cfg_scale", "index"), [(4.0, 1), ((1.0, 2.5), 1), (4.0, 3)])
def test_guidance_is_the_authors_formula(scale, cfg_scale, index):
    """In step 3 the motion acts no more, and the prompt alone guides."""
    model, payload = with_system(), motion(cfg_scale=cfg_scale, end=0.5)
    positive, negative = rand(5, 20, seed=6), rand(5, 20, seed=9)
    step = Step(index=index, total=4, in_run=index)
    denoise = Denoiser(
        model,
        Conditions(positive=positive, negative=negative, payloads=(payload,)),
        guidance=Guidance(cfg=(scale,), payloads=(payload,)),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    got = denoise(rand(16, 3, 4, 6, seed=5), torch.tensor(500.0), step)

    def passed(text, *payloads):
        return model(replace(inputs(*payloads, step=step), text=(text,)))[0].double()

    nothing, still, everything = passed(negative), passed(positive), passed(positive, payload)
    strength = cfg_scale if isinstance(cfg_scale, float) else cfg_scale[1]
    want = nothing + scale * (still - nothing) + strength * (everything - still)
    assert relative(got.double(), want) < 1e-5


def test_passes_of_guidance():
    rows = motion(cfg_scale=4.0).guidance(1.0, Step())
    assert rows == (Row(4.0), Row(-3.0, frozenset({"portrait"})), Row(0.0, frozenset({"text", "portrait"})))
    assert motion().guidance(5.0, Step()) is None and motion(cfg_scale=4.0, strength=0.0).guidance(1.0, Step()) is None
    assert motion().without(frozenset({"portrait"})) is None and motion().without(frozenset({"text"})) is not None


def test_its_layers_keep_their_precision():
    model = WanModel(CONFIG, (SYSTEM,))
    assert not quantizable(model, f"blocks.0.cross_attn.{K_PROJ}") and quantizable(model, "blocks.0.cross_attn.k")


class LooseAttention:
    """Requires what kernels do, and gives memory of another order."""

    def __call__(self, q, k, v, *, mask=None):
        assert all(t.stride(-1) == 1 for t in (q, k, v)) and mask is None
        return scattered(sdpa()(q, k, v))


@torch.no_grad()
def test_every_linear_layer_reads_dense_rows():
    """Whatever memory tokens, motion, projections and attention give."""
    model, dense = randomize(WanModel(CONFIG, (SYSTEM,))), []
    block, grid, x = model.blocks[0], (3, 2, 3), rand(2, 22, 24)
    cross, inside = block.cross_attn, BlockInputs(None, None, None, Text(rand(2, 4, 24, seed=1)), grid)

    def run(context):
        cond = frame_context(tokens_of(x, grid), context, scale=0.7, leading=0)
        return cross(x, inside, ((SYSTEM, cond),), block)[0]

    want = run(motion().context)
    for name in (K_PROJ, V_PROJ, "o"):
        layer = getattr(cross, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: dense.append((name, given[0].is_contiguous())))
    for name in ("q", K_PROJ, V_PROJ):
        getattr(cross, name).register_forward_hook(lambda _, __, out: scattered(out))
    cross.attention = LooseAttention()
    torch.testing.assert_close(run(scattered(motion().context)), want, rtol=1e-4, atol=1e-5)
    assert dense == [(K_PROJ, True), (V_PROJ, True), ("o", True)]
