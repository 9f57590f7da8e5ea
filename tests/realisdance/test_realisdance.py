"""RealisDance-DiT: tokens and positions against convolutions and angles in float64, and its node."""

from dataclasses import replace

import pytest
import torch
from published import config, randomized, relative
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.realisdance.extension import DancePoses, RealisDance
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TOKENS = HEIGHT * WIDTH // 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONDITION = ImageCondition(rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=4), rand(1, 4, FRAMES, HEIGHT, WIDTH, seed=5))
DANCE = DancePoses(
    reference=rand(1, 16, 1, HEIGHT, WIDTH, seed=6), poses=rand(1, 32, FRAMES, HEIGHT, WIDTH, seed=7),
    empty=rand(1, 16, 1, HEIGHT, WIDTH, seed=8), start=0.2, end=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return randomized(WanModel(config(36), (ImageToVideo(), RealisDance(32, 16))))


def inputs(*payloads, index=3, batch=1):
    return ModelInputs(
        latents=rand(batch, 16, FRAMES, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=payloads,
        step=Step(index=index, total=10),
    )  # fmt: skip


def first_block(model, asked):
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.extend((args[0], args[1].rope)))
    with torch.no_grad():
        model(asked)
    handle.remove()
    return seen


def convolved(conv, latents):
    """Patches [L, C] as products in float64."""
    weight, bias = conv.weight.double(), conv.bias.double()
    cells = latents[0].double().reshape(latents.shape[1], latents.shape[2], HEIGHT // 2, 2, WIDTH // 2, 2)
    patches = torch.einsum("cfhpwq,dcpq->fhwd", cells, weight[:, :, 0])
    return (patches + bias).flatten(0, 2)


@pytest.mark.parametrize(("index", "acts"), [(1, False), (2, True), (5, True), (6, False)])
def test_poses_are_added_in_their_steps_and_the_reference_follows_always(model, index, acts):
    plain, _ = first_block(model, inputs(CONDITION, index=index, batch=2))
    got, rope = first_block(model, inputs(CONDITION, DANCE, index=index, batch=2))
    poses = convolved(model.add_conv_in, DANCE.poses) @ model.add_proj.weight.double().T + model.add_proj.bias.double()
    want = plain.double() + (poses if acts else 0)
    reference = convolved(model.attn_conv_in, DANCE.reference).expand(2, -1, -1)
    assert relative(got, torch.cat((want, reference), dim=1).float()) < 1e-5
    assert got.is_contiguous() and got.shape[1] == (FRAMES + 1) * TOKENS
    height, width = HEIGHT // 2, WIDTH // 2
    placed = rope_table((1, height, width), 24, start=(81, height, width))
    assert torch.equal(rope, torch.cat((rope_table((FRAMES, height, width), 24), placed)))


@torch.no_grad()
def test_passes_without_the_prompt_see_an_empty_picture(model):
    got, plain = model(inputs(CONDITION, DANCE)), model(inputs(CONDITION))
    assert got.isfinite().all() and relative(got, plain) > 1e-3
    other = model(inputs(CONDITION, DANCE.without(frozenset({"text"}))))
    want = model(inputs(CONDITION, replace(DANCE, reference=DANCE.empty)))
    assert torch.equal(other, want) and relative(other, got) > 1e-4
    assert DANCE.without(frozenset({"audio"})) is DANCE


def test_a_window_has_its_poses():
    part = DANCE.window(Window((1, 2), tuple(range(5)), total=3))
    assert torch.equal(part.poses, DANCE.poses[:, :, 1:]) and part.reference is DANCE.reference
    with pytest.raises(ValueError, match="3 latent frames but the video has 5"):
        DANCE.window(Window((0, 1), tuple(range(5)), total=5))


def test_files_are_told_by_their_layers(model):
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert RealisDance(32, 16) in SYSTEMS.detect(shapes) and not SYSTEMS.missing(shapes)
    del shapes["attn_conv_in.weight"]
    assert not any(isinstance(e, RealisDance) for e in SYSTEMS.detect(shapes))


@torch.no_grad()
def test_sizes_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match="poses have latents"):
        model(inputs(CONDITION, replace(DANCE, poses=rand(1, 32, 2, HEIGHT, WIDTH))))
    with pytest.raises(ValueError, match="reference have latents"):
        model(inputs(CONDITION, replace(DANCE, reference=rand(1, 8, 1, HEIGHT, WIDTH))))


def test_node():
    process, smpl = N["WanVideoRealisDanceLatents"]().process, {"samples": rand(1, 16, 3, 4, 6, seed=1)}
    reference, hands = {"samples": rand(1, 16, 1, 4, 6, seed=2)}, {"samples": rand(1, 16, 3, 4, 6, seed=3)}
    (both,) = process(reference, 0.1, 0.8, hands, smpl)
    assert torch.equal(both.poses, torch.cat((smpl["samples"], hands["samples"]), dim=1))
    assert torch.equal(both.reference, reference["samples"]) and (both.start, both.end) == (0.1, 0.8)
    nothing = torch.zeros(1, 16, 3, 4, 6)
    without = process(reference, 0.0, 1.0, smpl_latent=smpl)[0]
    assert torch.equal(without.poses, torch.cat((smpl["samples"], nothing), dim=1))
    only_hands = process(reference, 0.0, 1.0, hamer_latent=hands)[0].poses
    assert torch.equal(only_hands, torch.cat((nothing, hands["samples"]), dim=1))
    with pytest.raises(ValueError, match="no poses to follow"):
        process(reference, 0.0, 1.0)
    with pytest.raises(ValueError, match="same frames and size"):
        process(reference, 0.0, 1.0, {"samples": rand(1, 16, 2, 4, 6)}, smpl)
