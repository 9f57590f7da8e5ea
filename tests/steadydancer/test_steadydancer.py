"""SteadyDancer's encoders and its transformer against their published form in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import SIZES, build, randomize
from float64_wan import Exact, layer_norm, rand, relative, weights
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.steadydancer.conditions import Alignment, DynamicConv, FactorConv3d
from wanvideo_wrapper.steadydancer.extension import DancePoses, SteadyDancer
from wanvideo_wrapper.steadydancer.nodes import WanVideoAddSteadyDancerEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6


def poses(frames=FRAMES, seed=1, **fields):
    return DancePoses(rand(1, 16, frames, HEIGHT, WIDTH, seed=seed), **fields)


def gate(x):
    return (x + 3).clamp(0, 6) / 3


def pointwise(p, name, x):
    """[F, z, H, W] through a convolution of one pixel."""
    bias = p.get(f"{name}.bias")
    out = torch.einsum("oi,fihw->fohw", p[f"{name}.weight"][:, :, 0, 0], x)
    return out if bias is None else out + bias[:, None, None]


def motion(p, x):
    """[F, z, H, W]; p: a dictionary with the keys of one factor."""
    padded = F.pad(x, (1, 1, 1, 1))
    taps = ((h, w) for h in range(3) for w in range(3))
    x = sum(p["spatial.weight"][:, 0, 0, h, w, None, None] * padded[..., h : h + x.shape[2], w : w + x.shape[3]]
            for h, w in taps)  # fmt: skip
    x = x * x.sigmoid()
    before = torch.cat((torch.zeros_like(x[:1]), x, torch.zeros_like(x[:1])))
    weight = p["temporal.weight"][..., 0, 0]
    out = sum(torch.einsum("oi,fihw->fohw", weight[:, :, t], before[t : t + len(x)]) for t in range(3))
    return out + p["temporal.bias"][:, None, None]


def structure(p, x):
    """Every frame on its own; four groups of one channel each are normalized over the pixels."""

    def grouped(name, y):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

    out = []
    for frame in x:
        features = p["fc.0.weight"] @ frame.mean((1, 2))
        features = features * gate(p["fc.1.fc.0.weight"] @ features)
        scaled = gate(p["fc_scale.weight"] @ features)[:, None, None] * pointwise(p, "conv", frame[None])[0]
        narrow = grouped("bn1", pointwise(p, "conv_q", frame[None])[0].flatten(1))
        narrow = narrow + grouped("bn2", (p["fc_phi.weight"] @ features).reshape(4, 4) @ narrow)
        out.append(scaled + pointwise(p, "conv_p", narrow.reshape(1, 4, *frame.shape[1:]))[0])
    return torch.stack(out)


def aligned(p, pose, noise):
    """Eight heads, among the frames of every pixel."""
    keys, queries = pointwise(p, "proj_p", pose), pointwise(p, "proj_r", noise)
    result = torch.empty_like(queries)
    projections = [part.chunk(3) for part in (p["cross_attn.in_proj_weight"], p["cross_attn.in_proj_bias"])]
    for h in range(pose.shape[2]):
        for w in range(pose.shape[3]):
            inputs = (queries[:, :, h, w], keys[:, :, h, w], keys[:, :, h, w])
            q, k, v = (x @ a.T + b for x, a, b in zip(inputs, *projections, strict=True))
            heads = zip(*(t.chunk(8, dim=-1) for t in (q, k, v)), strict=True)
            out = torch.cat([(a @ b.T / 4).softmax(-1) @ c for a, b, c in heads], dim=-1)
            result[:, :, h, w] = out @ p["cross_attn.out_proj.weight"].T + p["cross_attn.out_proj.bias"]

    def normed(name, x):
        return layer_norm(x.movedim(1, -1), 1e-5).movedim(-1, 1) * p[f"{name}.weight"] + p[f"{name}.bias"]

    result = normed("norm1", result)
    hidden = pointwise(p, "ffn_pose.0", result)
    return pointwise(p, "proj_p_back", normed("norm2", result + pointwise(p, "ffn_pose.2", hidden * hidden.sigmoid())))


def part(p, prefix):
    return {key.removeprefix(f"{prefix}."): value for key, value in p.items() if key.startswith(f"{prefix}.")}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "exact"), [(FactorConv3d, motion), (DynamicConv, structure), (Alignment, aligned)])
def test_encoders(kind, exact):
    module, x, noise = randomize(kind()), rand(3, 16, 4, 5, seed=2), rand(3, 16, 4, 5, seed=3)
    if kind is FactorConv3d:
        got, want = module(x.movedim(1, 0)[None])[0].movedim(1, 0), exact(weights(module), x.double())
    elif kind is Alignment:
        got, want = module(x, noise), exact(weights(module), x.double(), noise.double())
    else:
        got, want = module(x), exact(weights(module), x.double())
    assert relative(got, want) < 1e-5


def published(model, inputs, picture, given):
    """The velocity of one row as the authors compute it: F + 2 frames, of which the first F are returned."""
    exact, noise, pose = Exact(model), inputs.latents[0].double(), given.positive[0].double().movedim(1, 0)
    p = exact.weights
    moved = pose
    for number in (0, 2, 4):
        moved = motion(part(p, f"condition_embedding_temporal.{number}"), moved)
        moved = moved * moved.sigmoid()
    fused = pose + given.temporal * moved + given.spatial * structure(part(p, "condition_embedding_spatial"), pose)
    asked = aligned(part(p, "condition_embedding_align"), fused, noise.movedim(1, 0))
    condition = torch.cat((picture.mask, picture.cond), dim=1)[0].double()
    whole = torch.cat((noise, condition, fused.movedim(1, 0), asked.movedim(1, 0)))
    first = picture.cond[0, :, :1].double()
    reference = torch.cat((first, torch.ones(4, 1, HEIGHT, WIDTH).double(), first))

    def embedded(name, x):
        return F.conv3d(x[None], p[f"{name}.weight"], p[f"{name}.bias"], stride=(1, 2, 2)).flatten(2).mT

    x = torch.cat((embedded("patch_embedding_fuse", whole), embedded("patch_embedding", reference),
                   embedded("patch_embedding_ref_c", pose.movedim(1, 0)[:, :1])), dim=1)  # fmt: skip
    grid = (FRAMES + 2, HEIGHT // 2, WIDTH // 2)
    turns, text, (time, now) = exact.turns(grid), exact.text(inputs.text), exact.times(inputs.timestep)
    for i in exact.blocks:
        shift, gain, scale, ffn_shift, ffn_gain, ffn_scale = exact.modulated(i, now)
        heads = exact.self_qkv(i, exact.norm(x) * (1 + gain) + shift, turns)
        x = x + exact.linear(f"blocks.{i}.self_attn.o", exact.attention(*heads)) * scale
        x = x + exact.cross(i, x, text)
        x = x + exact.feed_forward(i, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_scale
    return exact.velocity(x, time, grid)[:, :, :FRAMES]


def built():
    return build(ImageToVideo(), SteadyDancer(), config=WanConfig(**SIZES, in_dim=36))[1]


def asked(*payloads, seeds=(3,)):
    return ModelInputs(
        latents=torch.cat([rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=seed) for seed in seeds]),
        timestep=torch.tensor([731.0] * len(seeds)), text=tuple(rand(4, 8, seed=7 + seed) for seed in seeds),
        payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip


PICTURE = ImageCondition(rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=4), rand(1, 4, FRAMES, HEIGHT, WIDTH, seed=5))


@torch.no_grad()
def test_velocity_of_every_row_is_the_published_one():
    model, given = built(), poses(spatial=0.6, temporal=1.4)
    got = model(asked(PICTURE, given, seeds=(3, 6)))
    for row, seed in enumerate((3, 6)):
        assert relative(got[row : row + 1], published(model, asked(seeds=(seed,)), PICTURE, given)) < 1e-5
    assert relative(model(asked(PICTURE)), got[:1].double()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 0.3, True), (0.31, 1.0, False)])
def test_poses_act_in_their_steps(start, end, acts):
    model = built()
    got, plain = model(asked(PICTURE, poses(start=start, end=end))), model(asked(PICTURE))
    assert torch.equal(got, plain) != acts


@torch.no_grad()
def test_every_layer_reads_dense_rows():
    model, dense = built(), []
    attention = model.condition_embedding_align.cross_attn
    for module in (attention, model.blocks[0]):
        module.register_forward_pre_hook(lambda _, given: dense.extend(
            t.is_contiguous() for t in given if isinstance(t, torch.Tensor)))  # fmt: skip
    model(asked(PICTURE, poses()))
    assert dense == [True] * 4


@torch.no_grad()
def test_negative_poses_go_with_the_negative_prompt():
    model = built()
    given = poses(negative=rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=9))
    positive, negative, latents = rand(4, 8, seed=2), rand(4, 8, seed=3), rand(16, FRAMES, HEIGHT, WIDTH, seed=1)
    denoiser = Denoiser(
        model, Conditions(positive=positive, negative=negative, payloads=(PICTURE, given)),
        guidance=Guidance(cfg=(5.0,), payloads=(given,)), device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip

    def run(text, pose):
        inputs = replace(asked(), text=(text,), latents=latents[None])
        return published(model, inputs, PICTURE, DancePoses(pose))[0]

    without = run(negative, given.negative)
    want = without + 5.0 * (run(positive, given.positive) - without)
    assert relative(denoiser(latents, torch.tensor(731.0), Step(index=3, total=10)), want) < 1e-5


def test_guidance_without_negative_poses_is_refused_before_work():
    guidance = Guidance(cfg=(5.0, 1.0), payloads=(poses(end=0.5),))
    with pytest.raises(ValueError, match="connect pose_latents_negative"):
        guidance.check_prompts([Step(index=0, total=4)], negative=True)
    assert len(guidance.rows(Step(index=3, total=4, in_run=1))) == 1
    assert len(Guidance(cfg=(5.0,), payloads=(poses(end=0.5),)).rows(Step(index=3, total=4))) == 2


def test_windows_take_their_frames():
    given = poses(9, negative=rand(1, 16, 9, HEIGHT, WIDTH, seed=9))
    seen = given.window(Window(latents=(0, 3, 4), pixels=tuple(range(9)), leading=1))
    assert torch.equal(seen.positive, given.positive[:, :, 2:4])
    assert torch.equal(seen.negative, given.negative[:, :, 2:4])
    assert poses().window(whole_window(FRAMES)).negative is None
    with pytest.raises(ValueError, match="cover 3 latent frames .* needs 4"):
        poses().window(whole_window(4))
    with pytest.raises(ValueError, match="same width, height and length"):
        built()(asked(PICTURE, poses(4)))


@torch.no_grad()
def test_what_clip_sees_in_the_pose_is_added_to_the_picture():
    _, model = build(ClipImageExtension(clip_dim=12))
    one, two = rand(1, 5, 12, seed=1), rand(1, 5, 12, seed=2)
    got = model(asked(ClipImage(one, added=two)))
    module = model.img_emb
    want = module(one) + module(two)
    model.img_emb = type("Given", (torch.nn.Module,), {"forward": lambda self, tokens: want})()
    torch.testing.assert_close(got, model(asked(ClipImage(one))), rtol=1e-4, atol=1e-5)
    assert ClipImage(one, two, added=one).without(frozenset({"text"})).added is one


class Other(Payload):
    needs = "none"


def test_node():
    add, other, clip = WanVideoAddSteadyDancerEmbeds().add, Other(), ClipImage(rand(1, 5, 12))
    embeds = ImageEmbeds(latent_shape=(16, FRAMES, HEIGHT, WIDTH), num_frames=9, payloads=(other, clip))
    latents = {"samples": rand(2, 16, FRAMES, HEIGHT, WIDTH)}
    (got,) = add(embeds, latents, 0.5, 0.7, 0.1, 0.9)
    assert got.payloads[:2] == (other, clip) and torch.equal(got.payloads[2].positive, latents["samples"][:1])
    fields = got.payloads[2]
    assert (fields.spatial, fields.temporal, fields.start, fields.end, fields.negative) == (0.5, 0.7, 0.1, 0.9, None)
    second = ClipImage(rand(1, 5, 12, seed=3))
    (got,) = add(embeds, latents, 0.5, 0.7, pose_latents_negative=latents, clip_vision_embeds=second)
    assert torch.equal(got.payloads[1].added, second.positive) and got.payloads[1].positive is clip.positive
    assert torch.equal(got.payloads[2].negative, latents["samples"][:1])
    with pytest.raises(ValueError, match="connect clip_embeds of WanVideoImageToVideoEncode"):
        add(replace(embeds, payloads=(other,)), latents, 1.0, 1.0, clip_vision_embeds=second)
    with pytest.raises(ValueError, match="same width, height and length"):
        add(embeds, latents, 1.0, 1.0, pose_latents_negative={"samples": rand(1, 16, 2, HEIGHT, WIDTH)})
