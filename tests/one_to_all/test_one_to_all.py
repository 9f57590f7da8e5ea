"""One-to-All against its authors' forward in float64: the reference as a first frame, poses as control."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import randomize
from float64_wan import Exact, places, rand, relative
from wanvideo_wrapper.one_to_all.control import Places, PoseControl
from wanvideo_wrapper.one_to_all.extension import POSE, Animation, OneToAll
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import NO_TEXT, Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, ModelInputs, Text

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=4, text_dim=8, text_len=4)
SYSTEM = OneToAll(control_layers=2, reference_layers=1, channels=32, pose_dim=24)
FRAMES, HEIGHT, WIDTH = 3, 4, 6
GRID = (FRAMES, 2, 3)
NOW = 731.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return randomize(WanModel(CONFIG, (SYSTEM,)))


def animation(*parts, **more):
    fields = {}
    if "reference" in parts:
        fields |= {"reference": rand(1, 32, 1, HEIGHT, WIDTH, seed=1), "empty": rand(1, 32, 1, HEIGHT, WIDTH, seed=2),
                   "ref_strength": torch.tensor(0.7)}  # fmt: skip
    if "poses" in parts:
        fields |= {"poses": rand(1, 3, 9, 32, 48, seed=3), "prefix": rand(1, 3, 1, 32, 48, seed=4),
                   "pose_strength": 0.6}  # fmt: skip
    return Animation(**fields | more)


def asked(*payloads, seeds=(5,), times=(NOW,), **more):
    """times: one, or one a frame."""
    times = times[0] if len(times) == 1 else times
    return ModelInputs(**{**dict(
        latents=torch.cat([rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=seed) for seed in seeds]),
        timestep=torch.tensor([times] * len(seeds)), text=tuple(rand(4, 8, seed=20 + seed) for seed in seeds),
        payloads=payloads, step=Step(index=3, total=10),
    ), **more})  # fmt: skip


def encoded(p, name, x, strides):
    """x [C, T, H, W]: every convolution sees the pixels around and, where it has a time, the two frames before; what
    lies outside is as the edge where it has a time, and empty where not."""

    def conv(x, layer, stride=(1, 1, 1)):
        key = f"{name}.{layer}.conv" if f"{name}.{layer}.conv.weight" in p else f"{name}.{layer}"
        weight, bias = p[f"{key}.weight"], p[f"{key}.bias"]
        if weight.dim() == 4:
            return F.conv2d(x[:, 0], weight, bias, padding=1)[:, None]
        for dim, before in ((1, 2), (2, 1), (3, 1)):
            last = x.shape[dim] - 1
            x = x.index_select(dim, torch.arange(-before, last + 1 + (dim > 1)).clamp(0, last))
        return F.conv3d(x, weight, bias, stride=stride)

    def active(x, layer):
        groups = x.reshape(4, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        weight, bias = (p[f"{name}.{layer}.{leaf}"].view(-1, 1, 1, 1) for leaf in ("weight", "bias"))
        x = groups.reshape(x.shape) * weight + bias
        return x * x.sigmoid()

    x = conv(x, "conv_in")
    for number, stride in enumerate(strides):
        block = f"down_blocks.{number}.resnets.0"
        y = conv(active(x, f"{block}.norm1"), f"{block}.conv1")
        x = x + conv(active(y, f"{block}.norm2"), f"{block}.conv2")
        if stride is not None:
            x = conv(x, f"down_blocks.{number}.downsamplers.0.conv", stride)
    return conv(x, "conv_out")


def part(exact, prefix):
    """The weights below `prefix` as those of a model of their own."""
    one = Exact.__new__(Exact)
    one.config = exact.config
    one.weights = {k.removeprefix(prefix): v for k, v in exact.weights.items() if k.startswith(prefix)}
    return one


def run_block(exact, index, x, mod, turns, more=None):
    """mod: six [1, 1 or L, C]. more: (modulated input, queries) -> what is added to the heads, and cross-attention."""
    shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = mod
    read = exact.norm(x) * (1 + gain) + shift
    heads = exact.attention(*exact.self_qkv(index, read, turns))
    x = x + exact.linear(f"blocks.{index}.self_attn.o", heads if more is None else heads + more[0](index, read)) * gate
    if more is not None:
        x = x + exact.cross(index, x, more[1])
    return x + exact.feed_forward(index, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_gate


def features_of(exact, reference, flat):
    """Of every block of the extractor and behind the last; positions without a time."""
    own = part(exact, "refextractor.")
    x, (_, now) = own.patches(reference), own.times(torch.tensor([NOW]))
    made = []
    for index in range(SYSTEM.reference_layers):
        made.append(own.linear(f"ref_blocks.{index}", x))
        x = run_block(own, index, x, own.modulated(index, now), flat)
    return [*made, own.linear(f"ref_blocks.{SYSTEM.reference_layers}", x)]


def published(model, inputs, given, held=0):
    """The velocity of one row as the authors compute it: the reference is frame 0, the next `held` ones are clean."""
    exact, first = Exact(model), 0
    p = exact.weights
    latents = inputs.latents.double()
    if given.reference is not None:
        frame = encoded(p, "image_to_cond", given.reference[0].double(), (None,) * 3)
        latents, first = torch.cat((frame[None], latents), dim=2), 1
    grid = (FRAMES + first, *GRID[1:])
    turns, count = exact.turns(grid), 2 * 3
    x, text = exact.patches(latents), exact.text(inputs.text)
    (time, now), (still, clean) = (exact.times(torch.tensor([t])) for t in (NOW, 0.0))
    is_held = torch.zeros(x.shape[1], 1, dtype=torch.bool)
    is_held[first * count : (first + held) * count] = True

    def mixed(owner, index):
        pairs = zip(owner.modulated(index, now), owner.modulated(index, clean), strict=True)
        return [torch.where(is_held, b, a) for a, b in pairs]

    flat = exact.turns_at(places((0,), range(2), range(3)))
    features = features_of(exact, given.reference, flat) if first else None

    def seen(index, read):
        if features is None:
            return 0.0
        name, feature = f"blocks.{index}", features[index // 2]
        q = exact.heads(exact.rms(f"{name}.self_attn.norm_q", exact.linear(f"{name}.self_attn.q", read)))
        k = exact.heads(exact.rms(f"{name}.ref_attn_norm_k_img", exact.linear(f"{name}.ref_attn_k_img", feature)))
        v = exact.heads(exact.linear(f"{name}.ref_attn_v_img", feature))
        heads = exact.attention(exact.turned(q, flat.repeat(grid[0], 1)), exact.turned(k, flat), v)
        return heads * given.ref_strength.double()

    control, owner = None, part(exact, "controlnet.")
    for i in exact.blocks:
        x = run_block(exact, i, x, mixed(exact, i), turns, (seen, text))
        if given.poses is None or i > SYSTEM.control_layers:
            continue
        if i == 0:
            strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
            drawn = [given.prefix[0]] * first + [given.poses[0]]
            drawn = torch.cat([encoded(p, "input_hint_block", d.double(), strides) for d in drawn], dim=1)
            control = x + drawn.flatten(1).T
        else:
            control = run_block(owner, i - 1, control, mixed(owner, i - 1), turns)
            x = x + given.pose_strength * exact.linear(f"controlnet_zero.{i - 1}", control)
    time = torch.where(is_held, still, time)[None]
    shift, scale = (exact.weights["head.modulation"][:, None] + time[:, :, None]).unbind(2)
    x = exact.linear("head.head", exact.norm(x) * (1 + scale) + shift)
    x = x.reshape(1, *grid, 2, 2, 16)
    return torch.einsum("bfhwpqc->bcfhpwq", x).flatten(5, 6).flatten(3, 4)[:, :, first:]


@torch.no_grad()
@pytest.mark.parametrize("parts", [("reference", "poses"), ("reference",), ("poses",)])
def test_velocity_of_every_row_is_the_published_one(model, parts):
    given = animation(*parts)
    got = model(asked(given, seeds=(5, 6)))
    for row, seed in enumerate((5, 6)):
        assert relative(got[row : row + 1], published(model, asked(seeds=(seed,)), given)) < 1e-5
    assert relative(model(asked()), got[:1].double()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("parts", [("reference", "poses"), ("poses",)])
def test_frames_that_go_on_are_at_time_0_and_the_reference_is_not(model, parts):
    given = animation(*parts)
    want = published(model, asked(), given, held=2)
    assert relative(model(asked(given, times=(0.0, 0.0, NOW))), want) < 1e-5
    assert relative(model(asked(given)), want) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("first", "last", "acts"), [(0.0, 0.29, False), (0.3, 0.3, True), (0.31, 1.0, False)])
def test_each_acts_in_its_steps(model, first, last, acts):
    both = animation("reference", "poses")
    for name, rest in (("ref", animation("poses")), ("pose", animation("reference"))):
        got = model(asked(replace(both, **{f"{name}_start": first, f"{name}_end": last})))
        torch.testing.assert_close(got, model(asked(both if acts else rest)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("cfg", [(1.0,), (1.5, 2.5)])
def test_passes_add_up_as_published(model, cfg, batched):
    """Without text + cfg * (without poses - without text) + 4 * (all - without poses); the pass without text has an
    empty reference, the one without poses has not."""
    given, positive, negative = animation("reference", "poses", cfg=cfg), rand(4, 8, seed=7), rand(3, 8, seed=8)
    denoiser = Denoiser(
        model, Conditions(positive=positive, negative=negative, payloads=(given,)),
        guidance=Guidance(cfg=(4.0,), payloads=(given,), batched=batched), device=CPU, dtype=torch.float32,
    )  # fmt: skip
    got = denoiser(asked().latents[0], torch.tensor(NOW), Step(index=3, total=10, in_run=1))

    def run(text, seen):
        return model(asked(seen, text=(text,)))[0]

    whole, empty = run(positive, given), run(negative, replace(given, reference=given.empty))
    still = run(negative, replace(given, poses=None))
    share = cfg[-1]
    want = empty + share * (still - empty) + 4.0 * (whole - still) if share != 1.0 else empty + 4.0 * (whole - empty)
    assert relative(got, want.double()) < 1e-5


def test_guidance_needs_poses_and_a_text_scale():
    step = Step(index=0, total=4)
    assert animation("reference", cfg=(1.5,)).guidance(4.0, step) is None
    assert animation("poses", cfg=(1.5,)).guidance(1.0, step) is None
    rows = animation("poses", cfg=(1.5,)).guidance(4.0, step)
    assert [(row.weight, row.without) for row in rows] == [
        (4.0, frozenset()), (-2.5, NO_TEXT | {POSE}), (-0.5, NO_TEXT)
    ]  # fmt: skip


@torch.no_grad()
def test_windows_take_the_poses_of_their_frames(model):
    long = animation("poses", poses=rand(1, 3, 17, 32, 48, seed=9))
    seen = long.window(Window(latents=(0, 2, 3), pixels=(5, 6, 7, 8, 9), leading=1))
    assert torch.equal(seen.poses, long.poses[:, :, 5:10]) and seen.leading == 1
    # The frame in front has no pose: as if the control blocks had got nothing for it.
    got, drawn = model(asked(seen)), []
    handle = model.input_hint_block.register_forward_hook(lambda module, given, out: drawn.append(out))
    model(asked(seen))
    handle.remove()
    handle = model.input_hint_block.register_forward_hook(
        lambda module, given, out: torch.cat((torch.zeros_like(out[:, :, :1]), drawn[0]), dim=2)
    )
    whole = model(asked(replace(seen, poses=long.poses[:, :, :9], leading=0)))
    handle.remove()
    assert torch.equal(got, whole)
    assert torch.equal(long.window(whole_window(3)).poses, long.poses[:, :, :9])
    assert animation("reference").window(whole_window(3)).poses is None
    with pytest.raises(ValueError, match="have 17 frames but the video needs 21"):
        long.window(whole_window(6))


@torch.no_grad()
def test_a_control_block_runs_late_where_its_main_block_was_left_out(model):
    poses, x, later = rand(1, 6, 24, seed=1), rand(1, 8, 24, seed=2), rand(1, 8, 24, seed=3)
    inputs = BlockInputs(rand(1, 1, 6, 24, seed=4), None, model.rope((1, 2, 4)), Text(x[:, :0]), (1, 2, 2))
    control = PoseControl(poses, 0.5, Places(4, 6, 8))
    assert control.behind(model, 0, x, inputs) is x
    got = control.behind(model, 2, later, inputs)
    own = torch.tensor([0, 1, 2, 3, 6, 7])
    c, read = x[:, own] + poses, inputs._replace(rope=inputs.rope[own])
    for block in model.controlnet.blocks:
        c = block(c, read)
    want = later.clone()
    want[:, own] += 0.5 * model.controlnet_zero[1](c)
    torch.testing.assert_close(got, want)
    assert control.behind(model, 3, later, inputs) is later


@torch.no_grad()
def test_every_layer_reads_dense_rows(model):
    dense, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("controlnet", "refextractor.blocks")):
            check = lambda module, given: dense.append(given[0].is_contiguous())  # noqa: E731
            handles.append(module.register_forward_pre_hook(check))
    model(asked(animation("reference", "poses"), seeds=(5, 6)))
    for handle in handles:
        handle.remove()
    assert len(dense) == 6 * 3 + 2 and all(dense)


def test_blocks_are_quantized_and_encoders_are_not(model):
    for name in ("controlnet.blocks.1.ffn.0", "refextractor.blocks.0.self_attn.q", "blocks.2.ref_attn_v_img"):
        assert quantizable(model, name)
    for name in ("controlnet_zero.0", "refextractor.ref_blocks.0", "refextractor.time_projection.1"):
        assert not quantizable(model, name)


@pytest.mark.parametrize(("fields", "says"), [
    ({"reference": rand(1, 32, 1, 4, 4)}, "encode ref_image"),
    ({"reference": rand(1, 16, 1, 4, 6)}, "encode ref_image"),
    ({"poses": rand(1, 3, 9, 32, 32)}, "pose_images are 32x32 but the video is 48x32"),
    ({"prefix": rand(1, 3, 1, 16, 48)}, "pose_prefix_image are 48x16"),
    ({"poses": rand(1, 3, 13, 32, 48)}, "13 frames, 4 in latents, but the video has 3"),
    ({"leading": 1}, "3 in latents, but the video has 2"),
])  # fmt: skip
def test_other_sizes_are_refused(model, fields, says):
    with pytest.raises(ValueError, match=says):
        model(asked(animation("reference", "poses", **fields)))


def test_a_pose_encoder_of_another_width_is_refused():
    other = WanModel(CONFIG, (replace(SYSTEM, pose_dim=16),))
    with pytest.raises(ValueError, match="tokens of 16 channels but the model's have 24"):
        other(asked(animation("poses")))
