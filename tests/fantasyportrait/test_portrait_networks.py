"""Projections and motion encoder against float64 forms, written with the tensors of the file."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fantasy_models import CONTEXT, DIM, LAYERS, PART_SIZES, motion_encoder, portrait_module, projections
from published import relative
from wanvideo_wrapper.fantasyportrait.motion import FaceAlignmentNetwork, FanEncoder, encode_motion, load_motion_encoder
from wanvideo_wrapper.fantasyportrait.projection import PortraitAdapter, Strengths, load_fantasyportrait
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS

FACTS = Path(__file__).parents[1] / "data" / "checkpoints"
HOST = StandaloneHost(device="cpu")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(p, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def resampled(p, top, x, scale):
    """One frame's part [channels] -> [queries, A]."""
    x = p[f"{top}proj_in.weight"] @ x + p[f"{top}proj_in.bias"]
    latents = p[f"{top}latents"][0]
    for i in range(LAYERS):
        name = f"{top}layers.{i}."
        own = norm(p, f"{name}0.norm2", latents)
        seen = torch.cat((norm(p, f"{name}0.norm1", x)[None], own))
        q, (k, v) = own @ p[f"{name}0.to_q.weight"].T, (seen @ p[f"{name}0.to_kv.weight"].T).chunk(2, dim=-1)
        heads = zip(*(t.split(64, dim=-1) for t in (q, k, v)), strict=True)
        out = torch.cat([(a @ b.T / 8).softmax(-1) @ c for a, b, c in heads], dim=-1)
        latents = latents + out @ p[f"{name}0.to_out.weight"].T
        hidden = norm(p, f"{name}1.0", latents) @ p[f"{name}1.1.weight"].T
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        latents = latents + hidden @ p[f"{name}1.3.weight"].T
    return scale * norm(p, f"{top}norm_out", latents @ p[f"{top}proj_out.weight"].T + p[f"{top}proj_out.bias"])


@torch.no_grad()
def test_projections(tmp_path):
    portrait_module().save(tmp_path / "portrait.safetensors", torch.float32)
    model = load_fantasyportrait(tmp_path / "portrait.safetensors", dtype=torch.float32, host=HOST, systems=SYSTEMS)
    features, p = rand(5, 554), {k: v.double() for k, v in projections().items()}
    got = model.project(features, Strengths(adapter=0.5, mouth=2.0, emo=3.0))
    assert got.shape == (1, 5 * 9, CONTEXT) and DIM == 2 * 64
    want = []
    for frame in features.double():
        parts = dict(zip(PART_SIZES, frame.split(tuple(PART_SIZES.values())), strict=True))
        for name in PART_SIZES:
            want.append(0.5 * norm(p, "proj_model.norm", p[f"proj_model.{name}_proj.weight"] @ parts[name]))
        want += [*resampled(p, "mouth_proj_model.", parts["mouth"], 2.0)]
        want += [*resampled(p, "emo_proj_model.", parts["emo"], 3.0)]
    assert relative(got[0].double(), torch.stack(want)) < 1e-5


def test_keys_and_shapes_are_the_published_ones():
    published = {}
    for key, value in json.loads((FACTS / "fantasyportrait.json").read_text()).items():
        for i in range(value["count"]) if isinstance(value, dict) and "count" in value else ():
            published[key.replace("{i}", str(i))] = tuple(value["shape"])
        if isinstance(value, list):
            published[key] = tuple(value)
    own = {key: shape for key, shape in published.items() if not key.startswith("ip_adapter.")}

    class Header:
        shapes = own

    with torch.device("meta"):
        model = PortraitAdapter(Header)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == own


def batch_norm(p, name, x):
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, var, weight, bias = (
        p[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def conv_block(p, name, x):
    """Pre-activated convolutions, joined, and the residual."""
    parts, y = [], x
    for i in (1, 2, 3):
        y = F.conv2d(batch_norm(p, f"{name}.bn{i}", y).clamp(min=0), p[f"{name}.conv{i}.weight"], padding=1)
        parts.append(y)
    if f"{name}.downsample.2.weight" in p:
        x = F.conv2d(batch_norm(p, f"{name}.downsample.0", x).clamp(min=0), p[f"{name}.downsample.2.weight"])
    return torch.cat(parts, dim=1) + x


def halved(x):
    """The largest of each two by two."""
    return (
        x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        .unflatten(-1, (-1, 2))
        .unflatten(-3, (-1, 2))
        .amax((-3, -1))
    )


def hourglass(p, name, x, level):
    low = conv_block(p, f"{name}.b2_{level}", halved(x))
    low = hourglass(p, name, low, level - 1) if level > 1 else conv_block(p, f"{name}.b2_plus_1", low)
    low = conv_block(p, f"{name}.b3_{level}", low)
    return conv_block(p, f"{name}.b1_{level}", x) + F.interpolate(low, size=x.shape[2:], mode="bilinear")


def motion_float64(p, faces):
    m = "pd_fpg.model."
    x = F.conv2d(faces, p[f"{m}conv1.weight"], p[f"{m}conv1.bias"], stride=2, padding=3)
    x = halved(conv_block(p, f"{m}conv2", batch_norm(p, f"{m}bn1", x).clamp(min=0)))
    x = conv_block(p, f"{m}conv4", conv_block(p, f"{m}conv3", x))
    x = conv_block(p, f"{m}top_m_0", hourglass(p, f"{m}m0", x, 4))
    x = batch_norm(p, f"{m}bn_end0", F.conv2d(x, p[f"{m}conv_last0.weight"], p[f"{m}conv_last0.bias"])).clamp(min=0)
    x = batch_norm(p, f"{m}bn5", F.conv2d(x, p[f"{m}l0.weight"], p[f"{m}l0.bias"])).clamp(min=0)
    x = F.conv2d(x, p[f"{m}conv6.weight"], p[f"{m}conv6.bias"], stride=2, padding=1).flatten(1).clamp(min=0)
    x = x @ p[f"{m}fc.weight"].T + p[f"{m}fc.bias"]
    found = []
    for name in ("headpose", "eye", "emo", "mouth"):
        top = f"pd_fpg.to_{name}."
        y = batch_norm(p, f"{top}2", (x @ p[f"{top}0.weight"].T + p[f"{top}0.bias"]).clamp(min=0))
        y = y @ p[f"{top}3.weight"].T + p[f"{top}3.bias"]
        if name != "mouth":
            head = f"pd_fpg.{name}_embed.1"
            y = y.clamp(min=0) @ p[f"{head}.weight"].T + p[f"{head}.bias"]
        found.append(y)
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_motion_encoder(tmp_path):
    portrait_module().save(tmp_path / "portrait.safetensors", torch.float32)
    encoder = load_motion_encoder(tmp_path / "portrait.safetensors", HOST)
    faces, p = rand(18, 3, 224, 224).clamp(-1, 1), {k: v.double() for k, v in motion_encoder().items()}
    got = encode_motion(encoder, faces)
    assert got.shape == (18, 554)
    # The ends of both batches.
    places = [0, 15, 16, 17]
    assert relative(got[places].double(), motion_float64(p, faces[places].double())) < 1e-5


def test_names_of_the_published_motion_encoder():
    with torch.device("meta"):
        model = FanEncoder(FaceAlignmentNetwork(64, 256, 68, 512), 512, (6, 6, 30))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted = {
        "model.conv1.weight": (64, 3, 7, 7), "model.conv2.downsample.2.weight": (128, 64, 1, 1),
        "model.m0.b2_plus_1.conv3.weight": (64, 64, 3, 3), "model.l0.weight": (68, 256, 1, 1),
        "model.conv6.weight": (1, 68, 3, 3), "model.fc.weight": (512, 784), "to_emo.2.running_var": (512,),
        "emo_embed.1.weight": (30, 512),
    }  # fmt: skip
    assert wanted.items() <= shapes.items()


def test_files_that_lack_a_part_are_named(tmp_path):
    portrait_module(motion=False).save(tmp_path / "still.safetensors")
    with pytest.raises(ValueError, match=r"still.safetensors has no motion encoder \('pd_fpg.model.fc.weight'\)"):
        load_motion_encoder(tmp_path / "still.safetensors", HOST)
    tensors = portrait_module().tensors
    del tensors["emo_proj_model.latents"]
    type(portrait_module())(tensors=tensors).save(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors lacks 'emo_proj_model.latents'"):
        load_fantasyportrait(tmp_path / "cut.safetensors", dtype=torch.float32, host=HOST, systems=SYSTEMS)
