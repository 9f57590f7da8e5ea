"""Speech encoder and attention, packed frames and the whole model against a float64 form; windows, passes, layouts."""

from dataclasses import replace

import pytest
import torch
from contract import build, cases_of, randomize
from float64_wan import (
    causal_conv,
    heads_attend,
    layer_norm,
    linear,
    patches,
    places,
    rand,
    relative,
    rms,
    silu,
    velocity,
    weights,
)
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.s2v.extension import SpeechToVideo, injected_blocks
from wanvideo_wrapper.s2v.modules import CausalAudioEncoder, FramePacker, past_positions
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

SIZES = cases_of("s2v")["s2v"].extension
# Five blocks, so that speech has two injectors.
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=5, in_dim=16, text_dim=8, text_len=6)
FRAMES, HEIGHT, WIDTH = 2, 10, 8
PAST_TIMES = {"proj": [-1], "proj_2x": [-3], "proj_4x": [-19, -14, -9, -4]}


@pytest.fixture(scope="module")
def model():
    return build(SIZES, config=CONFIG)[1]


def speech(**more):
    fields = {
        "audio": rand(1, 3, 5, 5, seed=1), "scale": torch.tensor(0.7),
        "reference": rand(1, 16, 1, HEIGHT, WIDTH, seed=2), "pose": rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=3),
    }  # fmt: skip
    return SpeechToVideo(**{**fields, **more})


def inputs(payload, batch=1, **more):
    return ModelInputs(
        latents=rand(batch, 16, FRAMES, HEIGHT, WIDTH, seed=5),
        timestep=torch.full((batch,), 500.0),
        text=tuple(rand(4, 8, seed=6 + i) for i in range(batch)),
        payloads=(payload,),
        **more,
    )


def encode_float64(p, audio, tokens):
    """[layers, channels, T] -> tokens [F, tokens + 1, C], and one vector a frame [F, C]."""
    share = silu(p["weights"].flatten())
    x = (audio * share[:, None, None]).sum(0).T / share.sum()

    def rest(hidden):
        for conv in ("2", "3"):
            hidden = causal_conv(p, f"encoder.conv{conv}", silu(layer_norm(hidden)), stride=2)
        return silu(layer_norm(hidden))

    local = causal_conv(p, "encoder.conv1_local", x).chunk(tokens, dim=-1)
    local = [rest(part) for part in local]
    learned = p["encoder.padding_tokens"][0, 0].expand(len(local[0]), -1)
    overall = linear(p, "encoder.final_linear", rest(causal_conv(p, "encoder.conv1_global", x)))
    return torch.stack([*local, learned], dim=1), overall


def hear_float64(p, place, video, tokens, overall, heads):
    """What an injector adds to the video tokens [F * S, C]."""
    name, out = f"audio_injector.injector.{place}", []
    for x, said, vector in zip(video.chunk(len(tokens)), tokens, overall, strict=True):
        shift, gain = linear(p, f"audio_injector.injector_adain_layers.{place}.linear", silu(vector)).chunk(2)
        x = layer_norm(x, eps=1e-5) * (1 + gain) + shift
        q, k = rms(p[f"{name}.norm_q.weight"], linear(p, f"{name}.q", x)), linear(p, f"{name}.k", said)
        y = heads_attend(q, rms(p[f"{name}.norm_k.weight"], k), linear(p, f"{name}.v", said), heads)
        out.append(linear(p, f"{name}.o", y))
    return torch.cat(out)


def packed_float64(p, past):
    """Tokens [M, C] of past latents [z, n, h, w], nearest first, and their positions in the video's grid."""
    past = torch.cat((past.new_zeros(past.shape[0], 19, *past.shape[2:]), past), dim=1)[:, -19:]
    rows, columns = past.shape[2] // 2, past.shape[3] // 2
    tokens, positions = [], []
    levels = (("proj", past[:, 18:], 1), ("proj_2x", past[:, 16:18], 2), ("proj_4x", past[:, :16], 4))
    for name, frames, coarser in levels:
        tokens.append(patches(p[f"{name}.weight"], p[f"{name}.bias"], frames))
        spread = [
            [int(i * (n - 1) / (n // coarser - 1)) if n // coarser > 1 else 0 for i in range(n // coarser)]
            for n in (rows, columns)
        ]
        positions += places(PAST_TIMES[name], *spread)
    return torch.cat(tokens), positions


def velocity_float64(model, payload, *, text, posed=True):
    p, heads, field = weights(model), model.config.num_heads, {k: getattr(payload, k) for k in ("audio", "pose")}
    marks, part = p["trainable_cond_mask.weight"], {"after": lambda index, video: 0.0}
    on_video = p["cond_encoder.bias"]
    if posed and field["pose"] is not None:
        on_video = patches(p["cond_encoder.weight"], p["cond_encoder.bias"], payload.pose[0].double())
    behind = []
    if payload.reference is not None:
        tokens = patches(p["patch_embedding.weight"], p["patch_embedding.bias"], payload.reference[0].double())
        behind.append((tokens + marks[1], places([30], range(HEIGHT // 2), range(WIDTH // 2))))
    if payload.past is not None:
        own = {k.removeprefix("frame_packer."): v for k, v in p.items() if k.startswith("frame_packer.")}
        tokens, positions = packed_float64(own, payload.past[0].double())
        behind.append((tokens + marks[2], positions))
    if field["audio"] is not None:
        own = {k.removeprefix("casual_audio_encoder."): v for k, v in p.items() if k.startswith("casual_")}
        audio = payload.audio[0].double()
        audio = torch.cat((audio[..., :1].expand(-1, -1, payload.lead), audio), dim=-1)
        said, overall = (out[payload.lead_latents :] for out in encode_float64(own, audio, SIZES.tokens))
        said = said * payload.scale.double()
        part["after"] = lambda index, video: (
            hear_float64(p, (0, 4).index(index), video, said, overall, heads) if index in (0, 4) else 0.0
        )
    latents = rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=5)[0]
    return velocity(model, latents, 500.0, text, on_video=on_video + marks[0], behind=behind, **part)


PAST = rand(1, 16, 5, HEIGHT, WIDTH, seed=9)
FORMS = {
    "all": speech(),
    "speech": speech(reference=None, pose=None),
    "silent": speech(audio=None),
    # Nine frames before the window are three latents: 9 + 5 columns make 4 of them, and the first 2 are cut.
    "past": speech(past=PAST, lead=5, lead_latents=1),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_whole_model(name, model):
    payload = FORMS[name]
    want = velocity_float64(model, payload, text=rand(4, 8, seed=6))
    assert relative(model(inputs(payload))[0], want) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 4, 9])
def test_the_speech_encoder(frames):
    encoder = randomize(CausalAudioEncoder(3, 5, 16, 4))
    audio = rand(2, 3, 5, frames, seed=3)
    got = encoder(audio)
    for row in range(2):
        want = encode_float64(weights(encoder), audio[row].double(), 4)
        assert all(relative(a[row], b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_speech_is_heard_in_time(model):
    """Later speech changes no earlier frame's tokens."""
    audio = rand(1, 3, 5, 10, seed=4)
    later = audio.clone()
    later[..., 6:] += 1
    one, other = (model.casual_audio_encoder(x)[0] for x in (audio, later))
    assert torch.equal(one[:, :2], other[:, :2]) and not torch.equal(one[:, 2], other[:, 2])


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 16, 24), (25, 10, 8), (19, 20, 34)])
def test_packed_frames_and_their_positions(frames, height, width):
    packer = randomize(FramePacker(16, 24))
    past = rand(1, 16, frames, height, width, seed=frames)
    want, positions = packed_float64(weights(packer), past[0].double())
    assert relative(packer(past)[0], want) < 1e-5
    got = past_positions(12, height // 2, width // 2, torch.device("cpu"))
    angles = torch.tensor([[t, t / 100, h, w] for t, h, w in positions], dtype=torch.float64)
    assert got.shape == (len(positions), 6, 2)
    frequencies = 10000.0 ** (-torch.arange(2) / 2.0)
    parts = [angles[:, :1] * frequencies, angles[:, 2:3] * frequencies, angles[:, 3:] * frequencies]
    angles = torch.cat(parts, dim=-1)
    torch.testing.assert_close(got.double(), torch.stack((angles.cos(), angles.sin()), -1), rtol=0, atol=1e-6)


def test_the_reference_stays_behind_long_videos(model):
    payload = speech(audio=None, pose=None)
    asked = []
    long = ModelInputs(
        latents=rand(1, 16, 23, HEIGHT, WIDTH), timestep=torch.tensor([500.0]), text=(rand(4, 8),), payloads=(payload,)
    )
    rope = model.rope
    model.rope = lambda grid, **options: asked.append((grid, options.get("start"))) or rope(grid, **options)
    try:
        model(long)
    finally:
        del model.rope
    assert ((1, 5, 4), (32, 0, 0)) in asked


def test_poses_act_in_their_part_of_the_steps(model):
    payload = speech(start=0.25, end=0.5)
    got = [model(inputs(payload, step=Step(index=index, total=4)))[0] for index in (0, 1, 2, 3)]
    acting, idle = (velocity_float64(model, payload, text=rand(4, 8, seed=6), posed=posed) for posed in (True, False))
    for out, want in zip(got, (idle, acting, acting, idle), strict=True):
        assert relative(out, want) < 1e-5


def test_passes_without_the_prompt_hear_silence(model):
    payload = speech()
    silent = payload.without(frozenset({"text"}))
    assert torch.equal(model(inputs(silent)), model(inputs(replace(payload, audio=torch.zeros(1, 3, 5, 5)))))
    assert payload.without(frozenset({"image"})) is payload
    both = payload.stack((silent,))
    rows = inputs(both, batch=2)
    rows = replace(rows, latents=rows.latents[:1].expand(2, -1, -1, -1, -1), text=rows.text[:1] * 2)
    want = torch.cat((model(inputs(payload)), model(inputs(silent))))
    torch.testing.assert_close(model(rows), want, rtol=1e-4, atol=1e-5)


def test_windows_take_their_frames():
    payload = speech(audio=rand(1, 3, 5, 14), pose=rand(1, 16, 4, 4, 4))
    part = payload.window(Window((1, 2, 3), tuple(range(4, 13))))
    assert torch.equal(part.audio, payload.audio[..., 4:13]) and torch.equal(part.pose, payload.pose[:, :, 1:])
    late = payload.window(Window((2, 3), (11, 12, 13, 14, 15)))
    assert torch.equal(late.audio, payload.audio[..., [11, 12, 13, 13, 13]])
    with pytest.raises(ValueError, match=r"pose_latent has 4 latent frames but the video needs 5"):
        payload.window(Window((3, 4), (12, 13, 14, 15, 16)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"audio": rand(1, 2, 5, 5)}, "hears 3 layers of 5 features but the audio encoder gives 2 of 5"),
        ({"audio": rand(1, 3, 5, 9)}, "speech covers 3 latent frames but the video has 2"),
        ({"reference": rand(1, 16, 1, 4, 4)}, r"ref_latent has frames of \(2, 2\) tokens but the video has \(5, 4\)"),
        ({"reference": rand(1, 48, 1, 10, 8)}, "ref_latent has 48 channels but the model reads 16"),
        ({"pose": rand(1, 16, 3, 10, 8)}, "pose_latent has 3 latent frames but the video has 2"),
    ],
)
def test_what_does_not_fit_is_named(change, says, model):
    with pytest.raises(ValueError, match=says):
        model(inputs(speech(**change)))


def test_the_loop_needs_patches_for_its_coarsest_frames():
    _, model = build(SIZES, config=CONFIG)
    small = replace(inputs(speech(reference=None, pose=None, past=rand(1, 16, 1, 6, 6))), latents=rand(1, 16, 2, 6, 6))
    with pytest.raises(ValueError, match="at least 64 pixels"):
        model(small)


def test_a_file_without_all_injectors_is_refused(model):
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if ".injector.1." not in k}
    assert injected_blocks(40) == (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    with pytest.raises(ValueError, match="1 S2V audio injectors, but a transformer of its size has 2"):
        type(SIZES).detect(shapes)


def test_every_linear_layer_gets_dense_input(model):
    """Rows of a batch, and video tokens with others behind them, are views before the injectors."""
    payload = speech(past=PAST, lead=5, lead_latents=1)
    strays, handles = [], []
    for name, module in model.audio_injector.named_modules():
        if isinstance(module, torch.nn.Linear):
            check = lambda m, args, name=name: strays.append(name) if not args[0].is_contiguous() else None  # noqa: E731
            handles.append(module.register_forward_pre_hook(check))
    try:
        model(inputs(payload, batch=2))
    finally:
        for handle in handles:
            handle.remove()
    assert len(handles) == 10 and not strays


def test_kernels_get_what_they_need(model, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    assert model(inputs(speech(past=PAST, lead=5, lead_latents=1), batch=2)).isfinite().all()
