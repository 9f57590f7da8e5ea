"""Wan controlnets against a float64 form written from the published equations; prompts, steps, windows, references."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import build, cases_of, inputs
from wanvideo_wrapper.controlnet.extension import Controlnet, Steering
from wanvideo_wrapper.distributed.sequence import SequenceShard
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import BlockInputs

HEADS, HEAD_SIZE, DIM = 4, 8, 32
(CASE,) = cases_of("controlnet").values()
PAYLOAD = CASE.payload
NET = PAYLOAD.controlnet


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, grid):
    """Each pair of channels of heads [L, H, D] as a complex number, turned by its place in time, height or width."""
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    spatial = 2 * (HEAD_SIZE // 6)
    sizes = (HEAD_SIZE - 2 * spatial, spatial, spatial)
    angles = torch.cat(
        [places[:, axis, None] / 10000 ** (torch.arange(0, n, 2).double() / n) for axis, n in enumerate(sizes)], dim=1
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def attention(p, name, x, context, grid=None):
    q, k, v = (linear(p, f"{name}.{part}", t) for part, t in (("q", x), ("k", context), ("v", context)))
    q, k = (
        t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.norm_{part}.weight"]
        for t, part in ((q, "q"), (k, "k"))
    )
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
    if grid is not None:
        q, k = turned(q, grid), turned(k, grid)
    heads = [(q[:, h] @ k[:, h].T / math.sqrt(HEAD_SIZE)).softmax(-1) @ v[:, h] for h in range(HEADS)]
    return linear(p, f"{name}.o", torch.cat(heads, dim=-1))


def encoded_float64(p, video):
    """The control video [3, T, H, W] through three convolutions, each behind it GELU and a norm of two groups."""
    x = video.double()[None]
    for stage, (stride, padding) in enumerate((((1, 8, 8), (1, 4, 4)), ((2, 1, 1), 1), ((2, 1, 1), 1))):
        name = f"control_encoder.{stage}"
        x = gelu(F.conv3d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], stride=stride, padding=padding))
        groups = x.unflatten(1, (2, -1))
        centred = groups - groups.mean((2, 3, 4, 5), keepdim=True)
        x = (centred / (centred.square().mean((2, 3, 4, 5), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        x = x * p[f"{name}.2.weight"][:, None, None, None] + p[f"{name}.2.bias"][:, None, None, None]
    return x


def states_float64(module, latents, times, prompt, video):
    """The states [L, C] of all blocks for latents [c, F, h, w], a timestep a frame [F], a prompt [T, text_dim]."""
    p = {k: v.double() for k, v in module.state_dict().items()}
    joined = torch.cat((latents.double()[None], encoded_float64(p, video)), dim=1)
    patches = F.conv3d(joined, p["patch_embedding.weight"], p["patch_embedding.bias"], stride=(1, 2, 2))[0]
    grid, x = patches.shape[1:], patches.flatten(1).T
    text = linear(p, "text_embedding.2", gelu(linear(p, "text_embedding.0", prompt.double())))
    half = module.sizes.config.freq_dim // 2
    angles = times.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    hidden = linear(p, "time_embedding.0", torch.cat((angles.cos(), angles.sin()), dim=1))
    embedding = linear(p, "time_embedding.2", hidden * hidden.sigmoid())
    mod = linear(p, "time_projection.1", embedding * embedding.sigmoid()).unflatten(1, (6, -1))
    mod = mod.repeat_interleave(grid[1] * grid[2], dim=0)
    states = []
    for index in range(len(module.blocks)):
        name = f"blocks.{index}"
        shift, scale, gate, shift2, scale2, gate2 = (p[f"{name}.modulation"] + mod).unbind(1)
        y = plain_norm(x) * (1 + scale) + shift
        x = x + gate * attention(p, f"{name}.self_attn", y, y, grid)
        x = x + attention(p, f"{name}.cross_attn", x, text)
        y = plain_norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(p, f"{name}.ffn.2", gelu(linear(p, f"{name}.ffn.0", y)))
        states.append(linear(p, f"controlnet_blocks.{index}", x))
    return states


def expected(given, video=PAYLOAD.control, prompt=None):
    times = given.timestep.reshape(len(given.timestep), -1)[0].expand(given.latents.shape[2])
    prompt = given.text[0] if prompt is None else prompt
    return states_float64(NET.module, given.latents[0, :16], times, prompt, video[0])


def steered(model, states, strength, given, stride=2):
    """The velocity of the plain model with `strength` * states added behind every second block."""
    hooks = [
        model.blocks[stride * place].register_forward_hook(lambda _, __, out, s=state: out + strength * s.float())
        for place, state in enumerate(states)
        if stride * place < len(model.blocks)
    ]
    velocity = model(given)
    for hook in hooks:
        hook.remove()
    return velocity


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("per_frame", [False, True])
def test_whole_model(per_frame, stride):
    base, model = build(Controlnet(), config=CASE.config)
    given = inputs()
    if per_frame:
        given = replace(given, timestep=torch.tensor([[0.0, 400.0, 900.0]]))
    want = steered(base, expected(given), 0.7, given, stride)
    got = model(replace(given, payloads=(replace(PAYLOAD, strength=0.7, stride=stride),)))
    assert relative(got, want) < 1e-5 and relative(base(given), want) > 1e-2


@torch.no_grad()
def test_states_one_by_one():
    _, model = build(Controlnet(), config=CASE.config)
    given = inputs()
    tokens = model._embed(given.latents, given)
    _, state = Controlnet().prepare(model, replace(PAYLOAD, stride=1), given, tokens)

    def of_the_model(q, k, v):
        raise AssertionError("the controlnet has attention of its own")

    block = BlockInputs(tokens.mod, tokens.rows, tokens.rope, tokens.text, tokens.grid, of_the_model)
    stranger = torch.randn(1, 5, 24)
    for index, want in enumerate(expected(given)):
        x = torch.cat((torch.zeros_like(tokens.x), stranger), dim=1)
        got = Controlnet().after_block(model, index, x, block, state)
        assert relative(got[0, : len(want)], want) < 1e-5 and torch.equal(got[:, len(want) :], stranger)
    assert torch.equal(Controlnet().after_block(model, 2, x, block, state), x)


@torch.no_grad()
def test_channels_of_a_picture_are_not_read():
    base, model = build(Controlnet(), config=replace(CASE.config, in_dim=36))
    given = inputs(channels=36)
    assert relative(model(replace(given, payloads=(PAYLOAD,))), steered(base, expected(given), 1.0, given)) < 1e-5


@torch.no_grad()
def test_passes_without_the_prompt_are_steered_by_the_prompt():
    base, model = build(Controlnet(), config=CASE.config)
    given, prompt = inputs(), torch.randn(3, 8)
    want = steered(base, expected(given, prompt=prompt), 1.0, given)
    got = model(replace(given, payloads=(PAYLOAD,), prompts=(prompt,)))
    assert relative(got, want) < 1e-5
    assert relative(model(replace(given, payloads=(PAYLOAD,))), want) > 1e-4


@torch.no_grad()
def test_blocks_that_the_transformer_skips_leave_no_gap():
    class Skips(Controlnet):
        def skips(self, state, index):
            return index == 0

    _, model = build(Skips(), config=CASE.config)
    base, _ = build(Controlnet(), config=CASE.config)
    given = inputs()
    second = expected(given)[1]
    base.blocks = base.blocks[1:]
    hook = base.blocks[1].register_forward_hook(lambda _, __, out: out + second.float())
    want = base(given)
    hook.remove()
    assert relative(model(replace(given, payloads=(PAYLOAD,))), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize(("leading", "trailing"), [(1, 0), (0, 1), (1, 1)])
def test_references_are_left_alone(leading, trailing, per_frame):
    """The controlnet sees the frames of the video; the tokens of references in front and behind stay."""
    base, model = build(Controlnet(), config=CASE.config)
    given = inputs()
    if per_frame:
        given = replace(given, timestep=torch.tensor([[100.0, 400.0, 900.0]]))
    video = PAYLOAD.control[:, :, : 4 * (3 - leading - trailing) - 3]
    frames = slice(leading, 3 - trailing)
    cut = replace(given, latents=given.latents[:, :, frames])
    if per_frame:
        cut = replace(cut, timestep=given.timestep[:, frames])
    around = torch.zeros(4 * leading, 24), torch.zeros(4 * trailing, 24)
    states = [torch.cat((around[0], state, around[1])) for state in expected(cut, video)]
    payload = replace(PAYLOAD, control=video, leading=leading, trailing=trailing)
    want = steered(base, states, 1.0, given)
    assert relative(model(replace(given, payloads=(payload,))), want) < 1e-5 < relative(base(given), want)


@pytest.mark.parametrize(("rank", "own"), [(0, [0, 1]), (1, [2, 3]), (2, [4])])
def test_a_rank_has_the_same_places_of_the_controlnets_frames(rank, own):
    """Three frames of five places behind a reference, which no token of the controlnet stands for."""
    shard = SequenceShard(group="", rank=rank, ranks=3, frame_count=4, places=5)
    token, rows = torch.arange(15.0), torch.arange(3).repeat_interleave(5)
    block = BlockInputs(torch.zeros(1, 3, 6, 8), rows, token.view(15, 1, 1), None, (3, 1, 5))
    state = Controlnet().on(Steering(PAYLOAD, block, token.view(1, 15, 1), first=5), shard)
    here = [5 * frame + place for frame in range(3) for place in own]
    assert state.x.flatten().tolist() == state.inputs.rope.flatten().tolist() == here
    assert state.inputs.rows.tolist() == [place // 5 for place in here]
    assert state.first == len(own) and state.inputs.grid == (3, 1, len(own))


def test_steps():
    """The end of the part is not in it, as the authors count."""
    assert [PAYLOAD.acts(Step(index=i, total=8)) for i in range(8)] == [True] * 8
    part = replace(PAYLOAD, start=0.25, end=0.5)
    assert [part.acts(Step(index=i, total=8)) for i in range(8)] == [i in (2, 3) for i in range(8)]
    assert not replace(PAYLOAD, end=0.0).acts(Step()) and not replace(PAYLOAD, strength=0.0).acts(Step())
    base, model = build(Controlnet(), config=CASE.config)
    for step in (1, 2, 3, 4):
        same = torch.equal(model(inputs(part, step=step)), base(inputs(step=step)))
        assert same == (step not in (2, 3))


def test_a_window_equals_the_slice_alone(caplog):
    caplog.set_level("INFO")
    video = torch.rand(1, 3, 25, 32, 32)
    payload = replace(PAYLOAD, control=video)
    pixels = (28 - 20, *range(9, 17))
    part = payload.window(Window((2, 3, 4), pixels, leading=1, trailing=2, total=7))
    assert torch.equal(part.control, video[:, :, list(pixels)]) and (part.leading, part.trailing) == (1, 2)
    _, model = build(Controlnet(), config=CASE.config)
    alone = replace(payload, control=video[:, :, 8:17])
    got = model(inputs(replace(part, leading=0, trailing=0)))
    torch.testing.assert_close(got, model(inputs(alone)))
    assert not caplog.text
    assert torch.equal(payload.window(whole_window(4)).control, video[:, :, :13]) and "first 13 are used" in caplog.text


def test_other_lengths_and_sizes_are_named():
    with pytest.raises(ValueError, match="has 9 frames but the video has 13: give WanVideo Controlnet Apply as many"):
        PAYLOAD.window(whole_window(4))
    with pytest.raises(ValueError, match="has 9 frames but the video has at least 17"):
        PAYLOAD.window(Window((3, 4), tuple(range(12, 17))))
    _, model = build(Controlnet(), config=CASE.config)
    with pytest.raises(ValueError, match="has 9 frames of 40x32, but the video 9 of 32x32"):
        model(inputs(replace(PAYLOAD, control=torch.rand(1, 3, 9, 32, 40))))
    _, model = build(Controlnet(), config=replace(CASE.config, dim=48))
    with pytest.raises(ValueError, match="tiny_controlnet.* is for transformers of 24 channels .* has 48 and 16"):
        model(inputs(PAYLOAD))


@pytest.mark.parametrize("swapped", [False, True])
def test_it_waits_where_the_blocks_of_the_transformer_do(swapped):
    with PAYLOAD.active(swapped=swapped):
        assert NET.turns.streamed == swapped


@torch.no_grad()
def test_every_linear_layer_reads_dense_rows():
    found = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: found.append(given[0].is_contiguous()))
        for layer in NET.module.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    _, model = build(Controlnet(), config=CASE.config)
    given = inputs(PAYLOAD)
    loose = given.latents.transpose(-1, -2).contiguous().transpose(-1, -2)
    got, want = model(replace(given, latents=loose)), model(given)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, want)
    assert len(found) > 30 and all(found)
