"""Audio projection, audio attention and the whole model against a float64 form; where the pictures go; layouts."""

import math

import pytest
import torch
from contract import build, cases_of, randomize
from layouts import Layout
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.humo.audio_attention import AudioCrossAttentionWrapper, AudioProjModel
from wanvideo_wrapper.humo.extension import HuMoWindow
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=36, text_dim=8, text_len=6)
SMALL = WanConfig(**{**CONFIG.__dict__, "in_dim": 16})
SIZES = cases_of("humo")["humo_17B"].extension
# Values in memory of another order, whose last dimension is not dense.
scattered = Layout("permuted", 0, 0).place


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(module):
    return {k: v.double() for k, v in module.state_dict().items()}


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def pictures(frames, references, **more):
    fields = {
        "audio": rand(1, frames, 8, 5, 3, seed=1), "scale": torch.tensor(0.7), "references": references,
        "cond": rand(1, 20, frames, 4, 6, seed=2), "early": rand(1, 20, frames, 4, 6, seed=3),
        "empty": rand(1, 20, frames, 4, 6, seed=4),
    }  # fmt: skip
    return HuMoWindow(**{**fields, **more})


def inputs(payload, frames, timestep=500.0, batch=1):
    return ModelInputs(
        latents=rand(batch, 16, frames, 4, 6, seed=5),
        timestep=torch.full((batch,), timestep),
        text=tuple(rand(4, 8, seed=6 + i) for i in range(batch)),
        payloads=(payload,),
    )


# The published model in float64: one frame, head and token at a time where that is short.


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def rms(p, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]


def layer_norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def affine(p, name, x, eps=1e-6):
    return layer_norm(x, eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def heads_attend(q, k, v, heads):
    """q [L, C], k and v [T, C]."""
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], dim=-1)


def turned(x, grid, heads):
    """RoPE: channels of a head are pairs; frames, rows and columns have their shares of the pairs."""
    size = x.shape[-1] // heads
    spatial = 2 * (size // 6)
    out = x.clone().unflatten(-1, (heads, size // 2, 2))
    places = [(f, h, w) for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    for token, place in enumerate(places):
        angles = []
        for position, width in zip(place, (size - 2 * spatial, spatial, spatial), strict=True):
            angles += [position * 10000.0 ** (-2 * i / width) for i in range(width // 2)]
        cos, sin = torch.tensor(angles).double().cos(), torch.tensor(angles).double().sin()
        a, b = x[token].unflatten(-1, (heads, size // 2, 2)).unbind(-1)
        out[token, ..., 0], out[token, ..., 1] = a * cos - b * sin, a * sin + b * cos
    return out.flatten(1)


def project_float64(p, audio, tokens, prefix="audio_proj."):
    """[F, 8, 5, channels] -> [F, tokens, channels]."""
    names = [f"{prefix}audio_proj_glob_{part}.layer" for part in ("1", "2", "3", "norm")]
    hidden = linear(p, names[1], linear(p, names[0], audio.flatten(1)).clamp(min=0)).clamp(min=0)
    return affine(p, names[3], linear(p, names[2], hidden).unflatten(-1, (tokens, -1)), eps=1e-5)


def hear_float64(p, prefix, x, audio, heads):
    """What audio attention adds: x [F * S, C], audio [F, T, A]; each frame by itself."""
    out = []
    for frame, tokens in zip(x.chunk(len(audio)), audio, strict=True):
        name = f"{prefix}audio_cross_attn"
        q = rms(p, f"{name}.norm_q", linear(p, f"{name}.q", affine(p, f"{prefix}norm1_audio", frame)))
        k, v = rms(p, f"{name}.norm_k", linear(p, f"{name}.k", tokens)), linear(p, f"{name}.v", tokens)
        out.append(linear(p, f"{name}.o", heads_attend(q, k, v, heads)))
    return torch.cat(out)


def velocity_float64(model, latents, timestep, text, audio, scale):
    """Of latents [in_dim, F, H, W] with all channels, for one audio [F, 8, 5, channels]."""
    config = model.config
    p = {k: v.double() for k, v in model.state_dict().items()}
    latents, text, audio, heads = latents.double(), text.double(), audio.double(), config.num_heads
    frames, height, width = latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2
    grid = (frames, height, width)
    cells = latents.unflatten(2, (height, 2)).unflatten(4, (width, 2)).permute(1, 2, 4, 0, 3, 5).flatten(3)
    x = cells.flatten(0, 2) @ p["patch_embedding.weight"].flatten(1).T + p["patch_embedding.bias"]

    half = config.freq_dim // 2
    angles = timestep * 10000.0 ** (-torch.arange(half).double() / half)
    time = linear(p, "time_embedding.0", torch.cat((angles.cos(), angles.sin())))
    time = linear(p, "time_embedding.2", silu(time))
    mod = linear(p, "time_projection.1", silu(time)).view(6, -1)
    text = torch.cat((text, text.new_zeros(config.text_len - len(text), text.shape[1])))
    text = linear(p, "text_embedding.2", gelu(linear(p, "text_embedding.0", text)))
    sound = project_float64(p, audio, model.audio_proj.tokens[0])

    for i in range(config.num_layers):
        b = f"blocks.{i}."
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = p[f"{b}modulation"][0] + mod
        y = layer_norm(x) * (1 + gain) + shift
        q, k = (rms(p, f"{b}self_attn.norm_{n}", linear(p, f"{b}self_attn.{n}", y)) for n in "qk")
        y = heads_attend(turned(q, grid, heads), turned(k, grid, heads), linear(p, f"{b}self_attn.v", y), heads)
        x = x + linear(p, f"{b}self_attn.o", y) * gate
        y = affine(p, f"{b}norm3", x)
        q = rms(p, f"{b}cross_attn.norm_q", linear(p, f"{b}cross_attn.q", y))
        k = rms(p, f"{b}cross_attn.norm_k", linear(p, f"{b}cross_attn.k", text))
        x = x + linear(p, f"{b}cross_attn.o", heads_attend(q, k, linear(p, f"{b}cross_attn.v", text), heads))
        x = x + scale * hear_float64(p, f"{b}audio_cross_attn_wrapper.", x, sound, heads)
        y = layer_norm(x) * (1 + ffn_gain) + ffn_shift
        x = x + linear(p, f"{b}ffn.2", gelu(linear(p, f"{b}ffn.0", y))) * ffn_gate

    shift, gain = p["head.modulation"][0] + time
    out = linear(p, "head.head", layer_norm(x) * (1 + gain) + shift)
    out = out.view(frames, height, width, 2, 2, config.out_dim)
    return out.permute(5, 0, 1, 3, 2, 4).reshape(config.out_dim, frames, 2 * height, 2 * width)


@torch.no_grad()
def test_projection():
    model = randomize(AudioProjModel(8 * 5 * 3, 10, 4, 12))
    audio = rand(1, 6, 8, 5, 3)
    assert relative(model(audio)[0], project_float64(weights(model), audio[0].double(), 4, prefix="")) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 4, 7])
def test_each_frame_attends_to_its_own_sound(frames):
    module = randomize(AudioCrossAttentionWrapper(CONFIG, 12))
    x, audio = rand(2, frames * 6, 24), rand(2, frames, 4, 12, seed=1)
    want = [
        hear_float64(weights(module), "", one.double(), heard.double(), 2) for one, heard in zip(x, audio, strict=True)
    ]
    assert relative(module(x, audio), torch.stack(want)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["17B", "1.7B"])
def test_the_whole_model_for_any_number_of_frames(config, frames):
    references = min(frames - 1, 2)
    payload = pictures(frames, references)
    model = randomize(WanModel(config, (SIZES,)))
    given = inputs(payload, frames)
    latents = given.latents[0].clone()
    if config is CONFIG:
        latents = torch.cat((latents, payload.cond[0]))
    elif references:
        latents[:, -references:] = payload.cond[0, 4:, -references:]
    want = velocity_float64(model, latents, 500.0, given.text[0], payload.audio[0], 0.7)
    assert relative(model(given)[0], want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["17B", "1.7B"])
def test_early_steps_read_their_own_pictures_row_by_row(config):
    model = randomize(WanModel(config, (SIZES,)))
    payload = pictures(3, 1)
    early, late = pictures(3, 1, cond=payload.early), pictures(3, 1, early=payload.cond)
    for timestep, wanted in ((980.0, late), (981.0, early), (980.5, early), (1000.0, early), (0.0, late)):
        assert torch.equal(model(inputs(payload, 3, timestep)), model(inputs(wanted, 3, timestep)))
    assert not torch.equal(model(inputs(payload, 3, 999.0)), model(inputs(late, 3, 999.0)))
    both = inputs(payload, 3, batch=2)
    mixed = ModelInputs(**{**both.__dict__, "timestep": torch.tensor([990.0, 500.0])})
    rows = [
        model(ModelInputs(**{**both.__dict__, "latents": both.latents[i : i + 1], "text": both.text[i : i + 1],
                             "timestep": mixed.timestep[i : i + 1]}))
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(model(mixed), torch.cat(rows), rtol=1e-4, atol=1e-5)
    per_frame = ModelInputs(**{**inputs(payload, 3).__dict__, "timestep": torch.tensor([[0.0, 990.0, 990.0]])})
    wanted = ModelInputs(**{**per_frame.__dict__, "payloads": (early,)})
    assert torch.equal(model(per_frame), model(wanted))


@torch.no_grad()
def test_start_pictures_fill_the_channels_and_references_their_end():
    """Mask and latents of another system stay but for the last frames."""
    model = randomize(WanModel(CONFIG, (ImageToVideo(), SIZES)))
    start = ImageCondition(rand(1, 16, 4, 4, 6, seed=8), rand(1, 4, 4, 4, 6, seed=9))
    payload = pictures(4, 1)
    given = inputs(payload, 4)
    cond = torch.cat((start.mask, start.cond), dim=1)
    cond[:, :, -1:] = payload.cond[:, :, -1:]
    both = ModelInputs(**{**given.__dict__, "payloads": (start, payload)})
    torch.testing.assert_close(model(both), model(inputs(pictures(4, 1, cond=cond), 4)))


@pytest.mark.parametrize(
    ("payload", "frames", "says"),
    [
        (pictures(3, 1, audio=rand(1, 3, 8, 5, 4)), 3, "read 120 features a frame but the audio encoder gives 160"),
        (pictures(3, 1, audio=rand(1, 2, 8, 5, 3)), 3, "made for 2 latent frames.* makes 3"),
    ],
)
def test_what_does_not_fit_is_named(payload, frames, says):
    with pytest.raises(ValueError, match=says):
        WanModel(CONFIG, (SIZES,))(inputs(payload, frames))
    wide = WanConfig(**{**CONFIG.__dict__, "in_dim": 40})
    with pytest.raises(ValueError, match="gives? 20 channels .* room for 24"):
        WanModel(wide, (SIZES,))(inputs(pictures(3, 1), 3))


def test_keys_of_multitalk_are_not_taken():
    """Its older files name a projection audio_proj.proj1, and its blocks have an audio_cross_attn too."""
    _, model = build(SIZES)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    others = {"audio_proj.proj1.weight": (4, 4), "blocks.0.audio_cross_attn.q_linear.weight": (4, 4)}
    assert SYSTEMS.detect(shapes | others).count(SIZES) == 1
    assert not any(SIZES.owns(key) for key in others)
    assert type(SIZES).detect(others) is None


def in_wider_rows(out):
    """[B, L, H, D] whose heads and channels join into a view, but whose rows do not follow each other."""
    wide = out.new_zeros(*out.shape[:2], out.shape[2] + 1, out.shape[3])
    return wide[:, :, :-1].copy_(out)


class LooseAttention:
    """Requires what kernels do, and gives memory as `place` puts it."""

    def __init__(self, place):
        self.place = place

    def __call__(self, q, k, v):
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        return self.place(sdpa()(q, k, v))


@torch.no_grad()
@pytest.mark.parametrize("place", [scattered, in_wider_rows], ids=["scattered", "in_wider_rows"])
@pytest.mark.parametrize("extra", [0, 5])
def test_every_linear_layer_of_audio_attention_reads_dense_rows(extra, place):
    """Whatever memory tokens, sound, projections and attention give; extra: tokens of others behind the video's."""
    module, dense = randomize(AudioCrossAttentionWrapper(CONFIG, 12)), []
    x, audio = rand(2, 18 + extra, 24), rand(2, 3, 4, 12, seed=1)
    want = module(x[:, :18].contiguous(), audio)
    attention = module.audio_cross_attn
    for name in ("q", "k", "v", "o"):
        layer = getattr(attention, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: dense.append((name, given[0].is_contiguous())))
        if name != "o":
            layer.register_forward_hook(lambda _, __, out: scattered(out))
    attention.attention = LooseAttention(place)
    got = module(scattered(x)[:, :18], scattered(audio))
    assert dense == [("q", True), ("k", True), ("v", True), ("o", True)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_audio_tokens_of_a_batch_are_its_own():
    model, seen = randomize(WanModel(CONFIG, (SIZES,))), []
    model.blocks[0].audio_cross_attn_wrapper.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    model(inputs(pictures(4, 1), 4, batch=2))
    assert seen[0].shape == (2, 4, 4, 12) and seen[0].is_contiguous()


@torch.no_grad()
def test_every_linear_layer_of_the_projection_reads_dense_rows():
    module, seen = randomize(AudioProjModel(8 * 5 * 3, 10, 4, 12)), []
    module.audio_proj_glob_1["layer"].register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    audio = rand(1, 12, 8, 5, 3)
    want = module(audio)
    torch.testing.assert_close(module(scattered(audio)), want)
    torch.testing.assert_close(module(audio[:, ::2]), want[:, ::2])
    assert seen == [True] * 3
