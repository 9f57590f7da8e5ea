"""The whole model against diffusers' class; windows, passes, strengths, and what does not fit."""

import re
from dataclasses import replace

import pytest
import torch
from contract import build, cases_of
from diffusers import WanAnimateTransformer3DModel
from float64_wan import rand, relative
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.key_names import to_diffusers
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

# Two adapter blocks in ten of the transformer; faces of 16 pixels.
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=10, in_dim=36, text_dim=8, text_len=4)
CASE = cases_of("animate")["animate"]
SIZES = replace(CASE.extension, channels=(4, 6, 5), blocks=2)
MOTION = {
    r"enc\.net_app\.convs\.0\.0\.weight": "conv_in.weight", r"enc\.net_app\.convs\.0\.1\.bias": "conv_in.act_fn.bias",
    r"enc\.net_app\.convs\.3\.weight": "conv_out.weight", r"enc\.fc\.": "motion_network.",
    r"dec\.direction\.weight": "motion_synthesis_weight", r"\.(conv\d)\.\d\.weight": r".\1.weight",
    r"\.(conv\d)\.\d\.bias": r".\1.act_fn.bias", r"\.skip\.1\.": ".conv_skip.",
}  # fmt: skip
ADAPTER = {"linear1_q": "to_q", "linear2": "to_out", "q_norm": "norm_q", "k_norm": "norm_k"}


def theirs(key, value):
    """A published tensor under diffusers' names."""
    if key.startswith("motion_encoder."):
        key = re.sub(r"enc\.net_app\.convs\.(1|2)\.", lambda m: f"res_blocks.{int(m[1]) - 1}.", key)
        for pattern, name in MOTION.items():
            key = re.sub(pattern, name, key)
        return {} if key.endswith("kernel") else {key: value.flatten() if key.endswith("act_fn.bias") else value}
    if key.startswith("face_adapter."):
        key = key.replace("fuser_blocks.", "")
        if "linear1_kv" in key:
            halves = zip(("to_k", "to_v"), value.chunk(2), strict=True)
            return {key.replace("linear1_kv", name): half for name, half in halves}
        for own, name in ADAPTER.items():
            key = key.replace(own, name)
        return {key: value}
    if key.startswith("face_encoder."):
        return {key.replace(".conv.", "."): value}
    return {to_diffusers(key): value}


@pytest.fixture(scope="module")
def pair():
    """The model, and diffusers' with its weights."""
    _, model = build(SIZES, config=CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("kernel"):
            row = torch.tensor([1.0, 3.0, 3.0, 1.0])
            parameter.copy_(torch.outer(row, row) / 64)
    other = WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, latent_channels=16, out_channels=16, text_dim=8,
        ffn_dim=32, num_layers=10, image_dim=None, motion_encoder_channel_sizes={"16": 4, "8": 6, "4": 5},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=3, motion_encoder_dim=8, face_encoder_hidden_dim=5,
        face_encoder_num_heads=2,
    ).eval().requires_grad_(False)  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        state |= theirs(key, value)
    other.load_state_dict(state)
    return model, other


def character(**more):
    fields = dict(
        cond=rand(1, 20, 3, 4, 6, seed=1), pose=rand(1, 16, 2, 4, 6, seed=2), faces=rand(1, 3, 5, 16, 16, seed=3)
    )
    return replace(CASE.payload, **{**fields, **more})


def inputs(payload, batch=1):
    return ModelInputs(
        latents=rand(batch, 16, 3, 4, 6, seed=5), timestep=torch.full((batch,), 500.0),
        text=tuple(rand(4, 8, seed=6 + i) for i in range(batch)), payloads=(payload,),
    )  # fmt: skip


def test_the_whole_model(pair):
    model, other = pair
    payload, given = character(), inputs(character(), batch=2)
    want = other(
        hidden_states=torch.cat((given.latents, payload.cond.expand(2, -1, -1, -1, -1)), dim=1),
        timestep=given.timestep, encoder_hidden_states=torch.stack(given.text),
        pose_hidden_states=payload.pose.expand(2, -1, -1, -1, -1),
        face_pixel_values=payload.faces.expand(2, -1, -1, -1, -1),
    ).sample  # fmt: skip
    assert relative(model(given), want.double()) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 9, 13])
def test_faces_become_tokens(pair, frames):
    """More pictures than the encoder takes at once."""
    model, other = pair
    faces = rand(frames, 3, 16, 16, seed=7)
    assert relative(model.motion_encoder(faces), other.motion_encoder(faces).double()) < 1e-5
    motion = rand(2, frames, 8, seed=8)
    assert relative(model.face_encoder(motion), other.face_encoder(motion).double()) < 1e-5


def test_strengths_scale_what_is_added(pair):
    model, _ = pair
    seen = []
    handle = model.face_adapter.fuser_blocks[0].register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    try:
        model(inputs(character()))
        model(inputs(character(pose_strength=torch.tensor(0.0), face_strength=torch.tensor(0.0))))
    finally:
        handle.remove()
    plain = model(inputs(character(pose=None, faces=None)))
    nothing = dict(pose_strength=torch.tensor(0.0), face_strength=torch.tensor(0.0))
    torch.testing.assert_close(model(inputs(character(**nothing))), plain, rtol=1e-5, atol=1e-5)
    half = model(inputs(character(pose=None, face_strength=torch.tensor(0.5))))
    assert not torch.allclose(half, model(inputs(character(pose=None)))) and not torch.allclose(half, plain)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_passes_without_the_prompt_see_a_black_face():
    payload = character()
    other = payload.without(frozenset({"text"}))
    assert torch.equal(other.faces, -torch.ones_like(payload.faces)) and other.pose is payload.pose
    assert payload.without(frozenset({"audio"})) is payload
    bare = character(faces=None)
    assert bare.without(frozenset({"text"})) is bare


def test_windows_keep_the_reference_and_take_their_frames():
    payload = character(
        cond=rand(1, 20, 6, 4, 6), pose=rand(1, 16, 5, 4, 6, seed=1), faces=rand(1, 3, 17, 16, 16, seed=2)
    )
    part = payload.window(Window((0, 3, 4, 5), tuple(range(8, 17)), leading=1))
    assert torch.equal(part.cond, payload.cond[:, :, [0, 3, 4, 5]])
    assert torch.equal(part.pose, payload.pose[:, :, 2:]) and torch.equal(part.faces, payload.faces[:, :, 8:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cond": rand(1, 20, 4, 4, 6)}, r"Animate embeds are \(20, 4, 4, 6\).*room for \(20, 3, 4, 6\)"),
        ({"cond": rand(1, 16, 3, 4, 6)}, r"Animate embeds are \(16, 3, 4, 6\)"),
        ({"pose": rand(1, 16, 3, 4, 6)}, r"poses give \(3, 2, 3\) tokens .* reference has \(2, 2, 3\)"),
        ({"faces": rand(1, 3, 9, 16, 16)}, "faces cover 3 latent frames but the video has 2"),
        ({"faces": rand(1, 3, 5, 8, 8)}, r"reads faces of 16x16 but got \(8, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(change, says, pair):
    with pytest.raises(ValueError, match=says):
        pair[0](inputs(character(**change)))


def test_kernels_and_linear_layers_get_what_they_need(pair, monkeypatch):
    model, strays = pair[0], []
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    handles = [
        module.register_forward_pre_hook(lambda m, a, n=name: strays.append(n) if not a[0].is_contiguous() else None)
        for name, module in model.face_adapter.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        assert model(inputs(character(), batch=2)).isfinite().all()
    finally:
        for handle in handles:
            handle.remove()
    assert len(handles) == 6 and not strays
