"""UniAnimate's encoders against sums over taps in float64, and where in the model their outputs go."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import SIZES, build
from float64_wan import rand, relative, velocity, weights
from published_keys import keys_of
from safetensors.torch import save_file
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.unianimate.extension import PoseEncoder, Poses, UniAnimate
from wanvideo_wrapper.unianimate.nodes import WanVideoUniAnimatePoseInput
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6
VIDEO = rand(1, 3, 9, 8 * HEIGHT, 8 * WIDTH, seed=1).abs()
REFERENCE = rand(1, 3, 8 * HEIGHT, 8 * WIDTH, seed=2).abs()


def convolved(p, name, x, stride, padding):
    """A convolution as a sum over its taps; x and the strides have any number of axes."""
    weight, axes = p[f"{name}.weight"], x.dim() - 2
    x = F.pad(x, (padding,) * 2 * axes)
    out = 0
    for tap in torch.ones(weight.shape[2:]).nonzero().tolist():
        last = [size - kernel + at + 1 for size, kernel, at in zip(x.shape[2:], weight.shape[2:], tap, strict=True)]
        part = x[(..., *(slice(a, b, s) for a, b, s in zip(tap, last, stride, strict=True)))]
        out = out + torch.einsum("oi,bi...->bo...", weight[(..., *tap)], part)
    return out + p[f"{name}.bias"].view(1, -1, *(1,) * axes)


def encoded(module, x, strides, last, padding):
    p, x = weights(module), x.double()
    for number, stride in enumerate(strides):
        x = convolved(p, str(2 * number), x, stride, 1)
        x = x * x.sigmoid()
    return convolved(p, str(2 * len(strides)), x, last, padding)


def tokens_of(module, video):
    whole = torch.cat((video[:, :, :1],) * 3 + (video,), dim=2)
    return encoded(module, whole, [(1, 1, 1)] * 3 + [(1, 2, 2), (2, 2, 2), (2, 2, 2)], (1, 2, 2), 0)


def asked(*payloads, in_dim=16):
    text = (rand(4, 8, seed=7),)
    latents = rand(1, in_dim, FRAMES, HEIGHT, WIDTH, seed=3)
    return ModelInputs(latents=latents, timestep=torch.tensor([731.0]), text=text, payloads=payloads,
                       step=Step(index=3, total=10))  # fmt: skip


@torch.no_grad()
def test_poses_are_added_to_the_tokens_of_the_video():
    _, model = build(UniAnimate())
    inputs, poses = asked(), Poses(VIDEO, strength=0.7)
    on_video = 0.7 * tokens_of(model.dwpose_embedding, VIDEO).flatten(2).mT
    want = velocity(model, inputs.latents[0], 731.0, inputs.text[0], on_video=on_video)[None]
    assert relative(model(replace(inputs, payloads=(poses,))), want) < 1e-5
    assert relative(model(inputs), want) > 1e-2


@torch.no_grad()
def test_the_reference_is_added_to_mask_and_picture():
    _, model = build(ImageToVideo(), UniAnimate(), config=WanConfig(**SIZES, in_dim=36))
    inputs, poses = asked(), Poses(VIDEO, REFERENCE, strength=0.7)
    picture = ImageCondition(rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=4), rand(1, 4, FRAMES, HEIGHT, WIDTH, seed=5))
    reference = encoded(model.randomref_embedding_pose, REFERENCE, [(1, 1)] * 3 + [(2, 2)] * 2, (2, 2), 1)
    assert reference.shape == (1, 20, HEIGHT, WIDTH)
    condition = torch.cat((picture.mask, picture.cond), dim=1).double() + 0.7 * reference[:, :, None]
    latents = torch.cat((inputs.latents.double(), condition), dim=1)[0]
    on_video = 0.7 * tokens_of(model.dwpose_embedding, VIDEO).flatten(2).mT
    want = velocity(model, latents, 731.0, inputs.text[0], on_video=on_video)[None]
    with_both = replace(inputs, payloads=(picture, poses))
    for _ in range(2):
        assert relative(model(with_both), want) < 1e-5
    assert relative(model(replace(inputs, payloads=(picture, replace(poses, reference=None)))), want) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("places", [(0, 1), (4, 5, 6), (1, 3, 5), (7, 8, 9, 12), (9, 0, 1)])
def test_a_window_sees_what_the_whole_would_show_it(places):
    """Nine latent frames of poses; frames behind them are as the last one."""
    encoder = PoseEncoder(24).double()
    video = rand(1, 3, 33, 16, 32, seed=6).double()
    whole = tokens_of(encoder, video)
    assert whole.shape == (1, 24, 9, 1, 2)
    assert relative(encoder.at(video, places), whole[:, :, [min(place, 8) for place in places]]) < 1e-12


@torch.no_grad()
def test_windows_skip_references():
    _, model = build(UniAnimate())
    video = rand(1, 3, 25, 8 * HEIGHT, 8 * WIDTH, seed=1).abs()
    part = Poses(video).window(Window(latents=(0, 4, 5), pixels=tuple(range(5)), leading=1))
    assert part.places == (3, 4) and part.leading == 1
    tokens = model._embed(asked().latents, asked())
    posed, state = model.extensions[0].prepare(model, part, asked(), tokens)
    change = posed.x - tokens.x
    assert state is None and not change[:, :6].any()
    assert relative(change[:, 6:], tokens_of(model.dwpose_embedding, video)[:, :, 3:5].flatten(2).mT) < 1e-5
    assert Poses(VIDEO).window(whole_window(FRAMES)).places == (0, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize(("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 0.3, True), (0.31, 1.0, False)])
def test_poses_act_in_their_steps(start, end, acts):
    _, model = build(UniAnimate())
    got, plain = model(asked(Poses(VIDEO, start=start, end=end))), model(asked())
    assert torch.equal(got, plain) != acts


def test_what_does_not_fit_is_said():
    _, model = build(UniAnimate())
    with pytest.raises(ValueError, match="pose_images are 48x16 but the video is 48x32"):
        model(asked(Poses(VIDEO[..., :16, :])))
    with pytest.raises(ValueError, match="image-to-video model, which is not here"):
        model(asked(Poses(VIDEO, REFERENCE)))
    _, model = build(ImageToVideo(), UniAnimate(), config=WanConfig(**SIZES, in_dim=36))
    picture = ImageCondition(rand(1, 16, FRAMES, HEIGHT, WIDTH), rand(1, 4, FRAMES, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="reference_pose_image are 32x32 but the video is 48x32"):
        model(asked(picture, Poses(VIDEO, REFERENCE[..., :32])))


def test_node():
    images, reference = torch.rand(9, 32, 48, 4), torch.rand(2, 32, 48, 3)
    (poses,) = WanVideoUniAnimatePoseInput().process(images, 0.5, 0.1, 0.9, reference_pose_image=reference)
    assert torch.equal(poses.video[0, 1, 2], images[2, ..., 1]) and poses.video.shape == (1, 3, 9, 32, 48)
    assert torch.equal(poses.reference[0, 2], reference[0, ..., 2]) and poses.reference.shape == (1, 3, 32, 48)
    assert (poses.strength, poses.start, poses.end) == (0.5, 0.1, 0.9)
    assert WanVideoUniAnimatePoseInput().process(images, 0.5, 0.1, 0.9)[0].reference is None


def test_keys_and_shapes_are_the_published_ones():
    shapes = keys_of("unianimate_extra")
    (found,) = [e for e in SYSTEMS.detect(shapes) if isinstance(e, UniAnimate)]
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=64, num_heads=40, num_layers=2), (found,))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if found.owns(k)} == shapes


@torch.no_grad()
def test_a_lora_file_brings_the_encoders_whatever_its_strength(tmp_path):
    whole = tiny.transformer(in_dim=16, extensions=(UniAnimate(),), layers=2)
    own = {k: v.contiguous() for k, v in whole.tensors.items() if UniAnimate().owns(k)}
    base = {k: v for k, v in whole.tensors.items() if k not in own}
    tiny.Tiny(tensors=base, metadata=whole.metadata).save(tmp_path / "base.safetensors", torch.float32)
    dim = base["blocks.0.self_attn.q.weight"].shape[0]
    pair = {f"blocks.0.self_attn.q.lora_{part}.default.weight": rand(*shape, seed=8)
            for part, shape in (("A", (2, dim)), ("B", (dim, 2)))}  # fmt: skip
    save_file({f"pipe.dit.{k}": v for k, v in (own | pair).items()}, tmp_path / "lora.safetensors")
    lora = LoraFile(path=tmp_path / "lora.safetensors", strength=0.5)
    options = LoadOptions(base_dtype=torch.float32, loras=(lora,))
    model = load_wan_model(tmp_path / "base.safetensors", options, StandaloneHost(device="cpu"), SYSTEMS)
    with model.active() as transformer:
        state = transformer.state_dict()
        assert len(own) == 26 and all(torch.equal(state[k], v) for k, v in own.items())
        changed = transformer.blocks[0].self_attn.q(rand(1, dim)) - F.linear(
            rand(1, dim), base["blocks.0.self_attn.q.weight"], base["blocks.0.self_attn.q.bias"]
        )
        down, up = pair.values()
        torch.testing.assert_close(changed, 0.5 * rand(1, dim) @ down.T @ up.T, rtol=1e-3, atol=1e-3)
