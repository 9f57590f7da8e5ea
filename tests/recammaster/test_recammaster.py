"""ReCamMaster against its published form in float64; its camera paths against the authors' numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from contract import SIZES, build
from float64_wan import Exact, rand, relative
from wanvideo_wrapper.recammaster import cameras, plot
from wanvideo_wrapper.recammaster.extension import CameraChange, ReCamMaster
from wanvideo_wrapper.recammaster.nodes import (
    WanVideoReCamMasterCameraEmbed,
    WanVideoReCamMasterDefaultCamera,
    WanVideoReCamMasterGenerateOrbitCamera,
)
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6


def payload(frames=FRAMES):
    return CameraChange(rand(1, frames, 12, seed=1), rand(1, 16, frames, HEIGHT, WIDTH, seed=2))


def asked(*payloads, batch=1, in_dim=16, **more):
    text = tuple(rand(4, 8, seed=7 + row) for row in range(batch))
    given = dict(latents=rand(batch, in_dim, FRAMES, HEIGHT, WIDTH, seed=3), timestep=torch.tensor([731.0] * batch))
    return ModelInputs(**{**given, "text": text, "payloads": payloads, **more})


def published(model, inputs, change):
    """Noise and source as one video of twice the frames; of it, the first half."""
    exact, batch = Exact(model), inputs.latents.shape[0]
    source = torch.nn.functional.pad(change.source, (0, 0) * 3 + (0, inputs.latents.shape[1] - 16))
    video = torch.cat((inputs.latents, source.expand(batch, -1, -1, -1, -1)), dim=2)
    grid = (2 * FRAMES, HEIGHT // 2, WIDTH // 2)
    x, turns, text = exact.patches(video), exact.turns(grid), exact.text(inputs.text)
    time, modulation = exact.times(inputs.timestep)
    for i in exact.blocks:
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = exact.modulated(i, modulation)
        camera = exact.linear(f"blocks.{i}.cam_encoder", change.poses.double()).repeat(1, 2, 1)
        read = exact.norm(x) * (1 + gain) + shift + camera.repeat_interleave(grid[1] * grid[2], dim=1)
        out = exact.linear(f"blocks.{i}.self_attn.o", exact.attention(*exact.self_qkv(i, read, turns)))
        x = x + exact.linear(f"blocks.{i}.projector", out) * gate
        x = x + exact.cross(i, x, text)
        x = x + exact.feed_forward(i, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_gate
    return exact.velocity(x, time, grid)[:, :, :FRAMES]


@torch.no_grad()
@pytest.mark.parametrize(("batch", "in_dim"), [(2, 16), (1, 20)])
def test_the_source_is_seen_behind_the_noise_from_the_same_cameras(batch, in_dim):
    _, model = build(ReCamMaster(), config=WanConfig(**SIZES, in_dim=in_dim))
    inputs, change = asked(batch=batch, in_dim=in_dim), payload()
    want = published(model, inputs, change)
    assert relative(model(replace(inputs, payloads=(change,))), want) < 1e-5
    assert relative(model(inputs), want) > 1e-2


@torch.no_grad()
def test_tokens_of_others_have_no_camera_and_the_source_is_behind_them():
    _, model = build(ReCamMaster())
    change, noise = payload(), asked()
    tokens = model._embed(noise.latents, noise)
    more = tokens.appended(rand(1, 5, 24), model.rope((1, 1, 5)))
    after, state = model.extensions[0].prepare(model, change, noise, more)
    assert after.x.shape[1] == 2 * 18 + 5 and torch.equal(after.x[:, :23], more.x)
    x, y, block = rand(1, 44, 24, seed=4), rand(1, 44, 24, seed=5), model.blocks[0]
    read, _ = ReCamMaster().self_attn_input(block, x, state)
    out, _ = ReCamMaster().self_attn_output(block, y, state)
    camera = block.cam_encoder(change.poses).repeat_interleave(6, dim=1)
    want = torch.cat((camera, torch.zeros(1, 5, 24), camera, torch.zeros(1, 3, 24)), dim=1)
    torch.testing.assert_close(read - x, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, 23:41], block.projector(y[:, 23:41]))
    assert torch.equal(out[:, 18:23], y[:, 18:23]) and torch.equal(out[:, 41:], y[:, 41:])
    _, alone = model.extensions[0].prepare(model, change, noise, tokens)
    out, _ = ReCamMaster().self_attn_output(block, y, alone)
    torch.testing.assert_close(out[:, :36], block.projector(y[:, :36]))
    assert torch.equal(out[:, 36:], y[:, 36:])


@torch.no_grad()
def test_every_layer_reads_dense_rows():
    _, model = build(ReCamMaster())
    scattered, dense = payload(), []
    scattered = CameraChange(scattered.poses.mT.contiguous().mT, scattered.source)
    names = ("cam_encoder", "self_attn.q", "projector")
    for name in names:
        layer = model.blocks[0].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, given, name=name: dense.append((name, given[0].is_contiguous())))
    model(asked(scattered))
    assert dense == [(name, True) for name in names]


def test_windows_take_the_same_frames_of_both():
    change = payload(9)
    part = change.window(Window(latents=(0, 3, 4), pixels=tuple(range(9)), leading=1))
    assert torch.equal(part.poses, change.poses[:, 2:4]) and torch.equal(part.source, change.source[:, :, 2:4])
    whole = change.window(whole_window(9))
    assert torch.equal(whole.poses, change.poses) and torch.equal(whole.source, change.source)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (CameraChange(rand(1, 3, 12), rand(1, 16, 4, HEIGHT, WIDTH)), "same width, height and length"),
        (CameraChange(rand(1, 3, 12), rand(1, 48, 3, HEIGHT, WIDTH)), "model's VAE"),
        (CameraChange(rand(1, 2, 12), rand(1, 16, 3, HEIGHT, WIDTH)), "make a path of 9 frames"),
    ],
)
def test_what_does_not_fit_is_said(change, says):
    with pytest.raises(ValueError, match=says):
        build(ReCamMaster())[1](asked(change))


# Of frames 4 and 80 in the authors' camera_extrinsics.json: some columns of the poses.
AUTHORS = {
    "pan_right": (80, 0, (0.940431, 0.339981, 0)),
    "tilt_up": (80, 0, (0.984995, 0, 0.17258)),
    "tilt_down": (80, 2, (0.17258, 0, 0.984995)),
    "zoom_in": (80, 3, (3588.76, 1380, 240)),
    "zoom_out": (80, 3, (3191.24, 1380, 240)),
    "translate_up": (80, 3, (3390, 1380, 339.379)),
    "translate_down": (80, 0, (0.970496, 0, 0.241117)),
    "arc_left": (80, 3, (3443.26, 1181.24, 240)),
    "arc_right": (80, 0, (0.867575, -0.497306, 0)),
}


@pytest.mark.parametrize(("name", "column"), AUTHORS.items())
def test_paths_are_the_authors(name, column):
    frame, number, values = column
    got = cameras.path(name, 81)
    assert got.shape == (21, 4, 4) and np.array_equal(got[0], cameras.path("pan_left", 1)[0])
    assert np.allclose(got[frame // 4, :3, number], values, rtol=0, atol=2e-6)


def test_an_orbit_turns_evenly():
    poses = cameras.orbit(9, 90)
    assert np.allclose(poses[1, :2, :2] @ poses[1, :2, :2], [[0, -1], [1, 0]], atol=1e-12)
    assert np.allclose(poses[2, :3, 3], (3390, 1379, 240)) and np.isfinite(cameras.orbit(1, 90)).all()


def test_the_model_reads_poses_relative_to_the_first_in_metres():
    """A camera that looks along x, goes 3 m ahead and 1 m up, and turns right by 90 degrees."""
    first, turned = np.eye(4), np.eye(4)
    first[:3, 3] = (100, 200, 300)
    turned[:3, :3] = ((0, -1, 0), (1, 0, 0), (0, 0, 1))
    turned[:3, 3] = (400, 200, 400)
    got = cameras.relative_poses([first, turned])
    assert got.dtype == np.float32 and np.allclose(got[0], np.eye(4)[:3].ravel())
    # Axes right, down, forward: forward is now what was right, and right what was backward.
    want = [[0, 0, 1, 0], [0, 1, 0, -1], [-1, 0, 0, 3]]
    assert np.allclose(got[1].reshape(3, 4), want, atol=1e-6)


def test_nodes():
    source = {"samples": rand(1, 16, 5, HEIGHT, WIDTH)}
    (poses,) = WanVideoReCamMasterDefaultCamera().process("arc_left", source)
    before = poses.copy()
    embeds, same = WanVideoReCamMasterCameraEmbed().process(poses, source)
    assert same is poses and np.array_equal(poses, before)
    assert (embeds.latent_shape, embeds.num_frames) == ((16, 5, HEIGHT, WIDTH), 17)
    (change,) = embeds.payloads
    assert torch.equal(change.source, source["samples"]) and change.poses.shape == (1, 5, 12)
    (around,) = WanVideoReCamMasterGenerateOrbitCamera().process(num_frames=13, degrees=45)
    with pytest.raises(ValueError, match="4 poses but the source video 5 latent frames: make a path of 17 frames"):
        WanVideoReCamMasterCameraEmbed().process(around, source)
    with pytest.raises(ValueError, match="81 frames but the source video 85"):
        WanVideoReCamMasterDefaultCamera().process("arc_left", {"samples": rand(1, 16, 22, 2, 2)})


def test_a_path_is_drawn_upright_and_as_wide_as_the_plot():
    poses = plot.upright(cameras.path("zoom_in", 81)[:, :3])
    assert np.allclose(poses[:, :3, 3].max(axis=0), (0, 1, 0)) and np.allclose(poses[0, :3, 2], (0, 1, 0))
    turning = plot.upright(cameras.path("pan_right", 81))
    assert np.allclose(turning[:, :3, 3], 0)
    faces = plot.pyramid(poses[-1], 0.2, 0.3)
    assert [len(face) for face in faces] == [3, 3, 3, 3, 4] and np.allclose(faces[4][:, 1], 1.3)


def test_a_picture_of_a_path():
    pytest.importorskip("matplotlib")
    poses = cameras.path("arc_right", 41)
    drawn = [plot.draw(poses, half_width=0.2, depth=0.3, scale=1.0, arrow=arrow) for arrow in (0, 1)]
    assert drawn[0].shape[0] == 1 and drawn[0].shape[3] == 4 and 0 <= drawn[0].min() < drawn[0].max() <= 1
    assert not torch.equal(*drawn)


def test_without_matplotlib_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib, or bypass"):
        plot.draw(cameras.path("arc_right", 41), half_width=0.2, depth=0.3, scale=1.0, arrow=1)
