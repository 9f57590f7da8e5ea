"""Uni3C against a float64 form written from the published equations; windows, steps, masks and its place in memory."""

import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from contract import build, cases_of, inputs
from swap_stand_in import LateCopies
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.uni3c.controlnet import Uni3CControlnet, joined_latents, resized
from wanvideo_wrapper.uni3c.extension import Uni3C
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.own_model import in_turns
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import BlockInputs

HEADS, HEAD_SIZE = 4, 8
(CASE,) = cases_of("uni3c").values()
PAYLOAD = CASE.payload
NET = PAYLOAD.controlnet


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def modulated(p, name, x, embedding):
    """LayerNorm with weights, then the time embedding's shift and scale; the gate; x [L, D], embedding [L, C]."""
    shift, scale, gate = linear(p, f"{name}.linear", embedding * embedding.sigmoid()).chunk(3, dim=-1)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * p[f"{name}.norm.weight"] + p[f"{name}.norm.bias"]
    return normed * (1 + scale) + shift, gate


def turned(x, grid):
    """Each pair of channels of heads [L, H, D] as a complex number, turned by its place in time, height or width."""
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    spatial = 2 * (HEAD_SIZE // 6)
    sizes = (HEAD_SIZE - 2 * spatial, spatial, spatial)
    angles = [places[:, axis, None] / 10000 ** (torch.arange(0, n, 2).double() / n) for axis, n in enumerate(sizes)]
    angles = torch.cat(angles, dim=1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def attention(p, name, x, grid):
    q, k, v = (linear(p, f"{name}.to_{part}", x) for part in "qkv")
    q, k = (
        t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.norm_{part}.weight"]
        for t, part in ((q, "q"), (k, "k"))
    )
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
    q, k = turned(q, grid), turned(k, grid)
    heads = [(q[:, h] @ k[:, h].T / math.sqrt(HEAD_SIZE)).softmax(-1) @ v[:, h] for h in range(HEADS)]
    return linear(p, f"{name}.to_out.0", torch.cat(heads, dim=-1))


def patches(p, name, video):
    """A convolution whose strides are its size, as a product of patches: [c, F, h, w] -> [L, out]."""
    weight = p[f"{name}.weight"]
    cells = video
    for axis, size in enumerate(weight.shape[2:]):
        cells = cells.unfold(axis + 1, size, size)
    cells = cells.permute(1, 2, 3, 0, 4, 5, 6)
    return torch.einsum("fhwcxyz,ocxyz->fhwo", cells, weight) + p[f"{name}.bias"]


def published(module):
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".o.": ".to_out.0."}
    renamed = {}
    for key, value in module.state_dict().items():
        for own, theirs in names.items():
            key = key.replace(f"self_attn{own}", f"self_attn{theirs}")
        renamed[key] = value
    return renamed


def states_float64(module, latents, render, embedding, mask=None):
    """The states [L, C] of all blocks, for latents [16 or more, F, h, w], render [c, F, h, w], embedding [L, C]."""
    p = {k: v.double() for k, v in published(module).items()}
    latents, render, embedding = latents.double(), render.double(), embedding.double()
    if latents.shape[0] == 16:
        latents = torch.cat((latents, torch.zeros(4, *latents.shape[1:], dtype=torch.float64)))
    x = patches(p, "controlnet_patch_embedding", torch.cat((latents[:20], render)))
    grid = x.shape[:3]
    if mask is not None:
        padded = torch.cat((torch.zeros(mask.shape[0], 3, *mask.shape[2:]), mask), dim=1).double()
        cells = patches(p, "controlnet_mask_embedding.mask_proj.0", padded).permute(3, 0, 1, 2)
        groups = cells.unflatten(0, (2, -1))
        groups = groups - groups.mean((1, 2, 3, 4), keepdim=True)
        cells = (groups / (groups.square().mean((1, 2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(0, 1)
        norm = "controlnet_mask_embedding.mask_proj.1"
        weight, bias = (p[f"{norm}.{name}"][:, None, None, None] for name in ("weight", "bias"))
        cells = cells * weight + bias
        x = x + patches(p, "controlnet_mask_embedding.mask_zero_proj", cells * cells.sigmoid())
    x = linear(p, "proj_in", x.flatten(0, 2))
    states = []
    for index in range(len(module.controlnet_blocks)):
        name = f"controlnet_blocks.{index}"
        y, gate = modulated(p, f"{name}.norm1", x, embedding)
        x = x + gate * attention(p, f"{name}.self_attn", y, grid)
        y, gate = modulated(p, f"{name}.norm2", x, embedding)
        y = linear(p, f"{name}.ffn.0", y)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + gate * linear(p, f"{name}.ffn.2", y)
        states.append(linear(p, f"proj_out.{index}", x))
    return states


def embedding_of(model, given):
    """The time embedding [L, C] float64 of every video token of the first row."""
    half = model.config.freq_dim // 2
    times = given.timestep.double().reshape(len(given.timestep), -1)[0]
    angles = times[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    hidden = torch.cat((angles.cos(), angles.sin()), dim=1)
    first, _, last = model.time_embedding
    hidden = hidden @ first.weight.double().T + first.bias.double()
    rows = (hidden * hidden.sigmoid()) @ last.weight.double().T + last.bias.double()
    frames = given.latents.shape[2]
    return rows.expand(frames, -1).repeat_interleave(given.latents[0, 0, 0].numel() // 4, dim=0)


def steered(model, states, strength, given):
    """The velocity of the plain model with `strength` * states added behind its blocks."""
    hooks = [
        block.register_forward_hook(lambda _, __, out, s=state: out + strength * s.float())
        for block, state in zip(model.blocks, states, strict=False)
    ]
    velocity = model(given)
    for hook in hooks:
        hook.remove()
    return velocity


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("in_dim", [16, 36])
def test_whole_model(in_dim, per_frame):
    """A text-to-video model, whose mask channels are zero, and one that reads a picture; one or several timesteps."""
    config = replace(CASE.config, in_dim=in_dim)
    base, model = build(Uni3C(), config=config)
    given = inputs(channels=in_dim)
    if per_frame:
        given = replace(given, timestep=torch.tensor([[0.0, 400.0, 900.0]]))
    states = states_float64(NET.module, given.latents[0], PAYLOAD.render[0], embedding_of(base, given))
    assert len(states) == 2 < len(base.blocks)
    want = steered(base, states, 0.7, given)
    got = model(replace(given, payloads=(replace(PAYLOAD, strength=0.7),)))
    assert relative(got, want) < 1e-5 and relative(base(given), want) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_states_one_by_one(per_frame):
    """Beside tokens of another system, which have rows of modulation of their own."""
    _, model = build(Uni3C(), config=CASE.config)
    given = inputs()
    if per_frame:
        given = replace(given, timestep=torch.tensor([[0.0, 400.0, 900.0]]))
    states = states_float64(NET.module, given.latents[0], PAYLOAD.render[0], embedding_of(model, given))
    latents = joined_latents(given.latents, PAYLOAD.render)
    hidden = NET.module.embed(latents, None)
    tokens = model._embed(given.latents, given)
    _, state = Uni3C().prepare(model, PAYLOAD, given, tokens)
    torch.testing.assert_close(state.x, hidden)

    def of_the_model(q, k, v):
        raise AssertionError("the controlnet has attention of its own")

    rows = F.pad(tokens.rows, (0, 5)) if per_frame else None
    block = BlockInputs(tokens.mod, rows, tokens.rope, tokens.text, tokens.grid, of_the_model)
    nothing, stranger = torch.zeros_like(tokens.x), torch.randn(1, 5, 24)
    for index, want in enumerate(states):
        got = Uni3C().after_block(model, index, torch.cat((nothing, stranger), dim=1), block, state)
        assert relative(got[0, : len(want)], want) < 1e-5 and torch.equal(got[:, len(want) :], stranger)


@torch.no_grad()
def test_a_mask_alone_is_read_by_files_for_it():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = Uni3CControlnet(replace(NET.module.sizes, extra=1), sdpa())
    net = replace(NET, managed=type("Held", (), {"module": module})())
    soft = torch.rand(1, 1, 9, 16, 16)
    base, model = build(Uni3C(), config=CASE.config)
    given, payload = inputs(), replace(PAYLOAD, controlnet=net, mask=soft)
    hard = F.interpolate(soft, size=(9, 32, 32), mode="nearest").ge(0.5).double()
    states = states_float64(module, given.latents[0], PAYLOAD.render[0], embedding_of(base, given), hard[0])
    want = steered(base, states, 1.0, given)
    assert relative(model(replace(given, payloads=(payload,))), want) < 1e-5
    assert relative(model(replace(given, payloads=(replace(payload, mask=None),))), want) > 1e-3
    with pytest.raises(ValueError, match="render_mask of Uni3C has 8 frames but the video has 9"):
        model(replace(given, payloads=(replace(payload, mask=soft[:, :, :8]),)))


def test_blocks_that_the_transformer_skips_leave_no_gap():
    """The chain of the controlnet goes on, and nothing is added behind a skipped block."""
    class Skips(Uni3C):
        def skips(self, state, index):
            return index == 0

    _, model = build(Skips(), config=CASE.config)
    base, _ = build(Uni3C(), config=CASE.config)
    given = inputs()
    states = states_float64(NET.module, given.latents[0], PAYLOAD.render[0], embedding_of(base, given))
    base.blocks = base.blocks[1:]
    want = steered(base, states[1:], 1.0, given)
    with torch.no_grad():
        assert relative(model(replace(given, payloads=(PAYLOAD,))), want) < 1e-5


@pytest.mark.parametrize(
    ("start", "end", "acting"),
    [(0.0, 1.0, range(8)), (0.25, 0.5, range(2, 5)), (0.0, 0.0, (0,)), (0.3, 1.0, range(3, 8))],
)
def test_steps(start, end, acting):
    base, model = build(Uni3C(), config=CASE.config)
    payload = replace(PAYLOAD, start=start, end=end)
    for step in range(8):
        same = torch.equal(model(inputs(payload, step=step)), base(inputs(step=step)))
        assert same == (step not in acting)


@pytest.mark.parametrize("frames", [7, 4, 10])
def test_a_window_equals_the_slice_alone(frames):
    """A render of another length is stretched over the whole run first, as it is without windows."""
    render = torch.randn(1, 16, frames, 2, 2)
    payload = replace(PAYLOAD, render=render)
    whole = resized(render, (7, 2, 2))
    part = payload.window(Window((4, 5, 6), tuple(range(16, 25)), total=7))
    assert torch.equal(part.render, whole[:, :, 4:7])
    torch.testing.assert_close(payload.window(whole_window(7)).render, whole)
    _, model = build(Uni3C(), config=CASE.config)
    got, want = (model(inputs(replace(PAYLOAD, render=r))) for r in (part.render, resized(whole[:, :, 4:7], (3, 4, 4))))
    torch.testing.assert_close(got, want)


def test_what_ends_before_the_window_is_named():
    payload = replace(PAYLOAD, mask=torch.rand(1, 1, 9, 8, 8))
    with pytest.raises(ValueError, match="render_latent of Uni3C has 3 frames but the video needs 5"):
        payload.window(Window((3, 4), tuple(range(12, 17))))
    with pytest.raises(ValueError, match="render_mask of Uni3C has 9 frames but the video needs 17"):
        payload.window(Window((3, 4), tuple(range(12, 17)), total=5))
    assert torch.equal(payload.window(Window((1, 2), tuple(range(4, 9)), total=3)).mask, payload.mask[:, :, 4:])
    # In a loop the last frame stands where a window reaches behind the video.
    behind = payload.window(Window((1, 2), tuple(range(6, 11)), end=3)).mask
    assert torch.equal(behind, payload.mask[:, :, [6, 7, 8, 8, 8]])


def test_other_sizes_are_named():
    _, model = build(Uni3C(), config=replace(CASE.config, dim=48))
    with pytest.raises(ValueError, match="tiny_uni3c.* steers transformers of 24 channels .* this one has 48"):
        model(inputs(PAYLOAD))
    _, model = build(Uni3C(), config=CASE.config)
    with pytest.raises(ValueError, match="render_latent of Uni3C has 48 channels but tiny_uni3c.safetensors reads 16"):
        model(inputs(replace(PAYLOAD, render=torch.randn(1, 48, 3, 4, 4))))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_offload_alone_says_whether_it_waits(offload, swapped):
    with replace(PAYLOAD, offload=offload).active(swapped=swapped):
        assert NET.turns.streamed == offload


@torch.no_grad()
def test_every_linear_layer_reads_dense_rows():
    found = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: found.append(given[0].is_contiguous()))
        for layer in NET.module.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    _, model = build(Uni3C(), config=CASE.config)
    given = inputs(PAYLOAD)
    loose = given.latents.transpose(-1, -2).contiguous().transpose(-1, -2)
    got, want = model(replace(given, latents=loose)), model(given)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, want)
    assert len(found) > 30 and all(found)


@pytest.mark.parametrize("streamed", [False, True])
def test_compiled_blocks_are_full_graphs_that_are_compiled_once(streamed):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    net, copies = replace(NET, compile=CompileArgs(backend=counter, fullgraph=True)), LateCopies()
    if streamed:
        managed, turns = in_turns(NET.module, StandaloneHost(device="cpu:0"))
        turns.copies_for = lambda device: copies
        net = replace(net, managed=managed, turns=turns)
    _, model = build(Uni3C(), config=CASE.config)
    want = model(inputs(PAYLOAD))
    with replace(PAYLOAD, controlnet=net).active(swapped=False):
        for step in range(3):
            payload = replace(PAYLOAD, controlnet=net, strength=1.0 + 0.5 * step)
            got = model(inputs(payload, step=step))
            if not step:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert 0 < counter.frame_count <= 2 and (copies.copied > 6) == streamed
    assert all(block._compiled_call_impl is None for block in NET.module.controlnet_blocks)

