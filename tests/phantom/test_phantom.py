"""Phantom against diffusers' transformer on latents with the references behind them, as the authors run it."""

from dataclasses import replace

import pytest
import torch
from published import config, published, randomized, relative, velocity
from wanvideo_wrapper.phantom.extension import Phantom, SubjectReferences
from wanvideo_wrapper.phantom.nodes import WanVideoPhantomEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step, Window
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, SUBJECTS, HEIGHT, WIDTH = 3, 2, 4, 6
TOKENS = HEIGHT * WIDTH // 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(in_dim=16):
    model = randomized(WanModel(config(in_dim), (Phantom(),)))
    return model, published(model)


def inputs(*payloads, batch=1, frames=FRAMES, channels=16, **more):
    fields = dict(
        latents=rand(batch, channels, frames, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip
    return ModelInputs(**{**fields, **more})


def references(**fields):
    return SubjectReferences(rand(1, 16, SUBJECTS, HEIGHT, WIDTH, seed=9), **fields)


def behind(latents, references):
    return torch.cat((latents, references.expand(latents.shape[0], -1, -1, -1, -1)), dim=2)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_references_are_frames_behind_the_video(batch):
    model, reference = build()
    subjects = references()
    asked = inputs(subjects, batch=batch)
    want = velocity(reference, behind(asked.latents, subjects.latents), asked)[:, :, :FRAMES]
    assert relative(model(asked), want) < 1e-5
    assert relative(model(replace(asked, payloads=())), want) > 1e-3


@torch.no_grad()
def test_condition_channels_of_references_are_empty():
    model, reference = build(in_dim=20)
    subjects, asked = references(), inputs(channels=20)
    padded = torch.cat((subjects.latents, torch.zeros(1, 4, SUBJECTS, HEIGHT, WIDTH)), dim=1)
    want = velocity(reference, behind(asked.latents, padded), asked)[:, :, :FRAMES]
    assert relative(model(replace(asked, payloads=(subjects,))), want) < 1e-5


@torch.no_grad()
def test_where_frames_differ_in_time_references_are_as_noisy_as_the_last():
    model, reference = build()
    subjects = references()
    times = torch.tensor([[0.0, 310.5, 731.0]])
    asked = inputs(subjects, timestep=times)
    per_token = torch.cat((times, times[:, -1:].expand(-1, SUBJECTS)), dim=1).repeat_interleave(TOKENS, dim=1)
    want = velocity(reference, behind(asked.latents, subjects.latents), asked, per_token)[:, :, :FRAMES]
    assert relative(model(asked), want) < 1e-5


@torch.no_grad()
def test_positions_go_on_behind_the_video_under_riflex_too():
    model, _ = build()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.extend((args[1].rope, args[0])))
    model(inputs(references(), riflex_index=2))
    assert seen[1].is_contiguous()
    whole = (FRAMES + SUBJECTS, HEIGHT // 2, WIDTH // 2)
    assert torch.equal(seen[0], rope_table(whole, 24, riflex_index=2, riflex_frames=FRAMES))


@torch.no_grad()
def test_every_window_sees_all_references():
    model, reference = build()
    subjects = references()
    part = subjects.window(Window(latents=(4, 5), pixels=tuple(range(5))))
    asked = inputs(part, frames=2)
    want = velocity(reference, behind(asked.latents, subjects.latents), asked)[:, :, :2]
    assert relative(model(asked), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 1.0, True), (0.0, 0.3, True), (0.31, 1.0, False)]
)
def test_references_are_there_in_their_steps_only(start, end, acts):
    model, _ = build()
    got, plain = model(inputs(references(start=start, end=end))), model(inputs())
    assert torch.equal(got, plain) != acts
    rule = references(cfg=(3.0,), start=start, end=end).guidance(6.0, Step(index=3, total=10))
    assert (rule is not None) == acts


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("in_run", "cfg"), [(0, 2.5), (1, 0.5), (4, 0.5)])
def test_three_passes_add_up_as_published(batched, in_run, cfg):
    """neg + cfg * (subjects - neg) + scale * (all - subjects), neg with empty references."""
    model, reference = build()
    subjects = references(cfg=(2.5, 0.5))
    positive, negative, latents = rand(5, 20, seed=2), rand(4, 20, seed=3), rand(16, FRAMES, HEIGHT, WIDTH, seed=1)
    denoiser = Denoiser(
        model, Conditions(positive=positive, negative=negative, payloads=(subjects,)),
        guidance=Guidance(cfg=(6.0,), payloads=(subjects,), batched=batched), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    got = denoiser(latents, torch.tensor(731.0), Step(index=3, total=10, in_run=in_run))

    def run(text, pictures):
        asked = inputs(text=(text,))
        return velocity(reference, behind(latents[None], pictures), asked)[0, :, :FRAMES]

    whole, seen = run(positive, subjects.latents), run(negative, subjects.latents)
    nothing = run(negative, torch.zeros_like(subjects.latents))
    assert relative(got, nothing + cfg * (seen - nothing) + 6.0 * (whole - seen)) < 1e-5


def test_without_either_scale_text_guides_alone():
    step = Step(index=0, total=4)
    assert references(cfg=(1.0,)).guidance(6.0, step) is None
    assert references(cfg=(5.0,)).guidance(1.0, step) is None
    assert len(Guidance(cfg=(6.0,), payloads=(references(cfg=(1.0,)),)).rows(step)) == 2


def test_references_of_another_size_or_vae_are_named():
    model, _ = build()
    with pytest.raises(ValueError, match="have 48 latent channels but the video 16"):
        model(inputs(SubjectReferences(rand(1, 48, 1, HEIGHT, WIDTH))))
    with pytest.raises(ValueError, match=r"references give \(3, 3\).*video has \(2, 3\)"):
        model(inputs(SubjectReferences(rand(1, 16, 1, 6, 6))))


def latent(frames=1, height=HEIGHT, seed=0):
    return {"samples": rand(1, 16, frames, height, WIDTH, seed=seed)}


class Control(Payload):
    needs = "none"


def test_node():
    process = WanVideoPhantomEmbeds().process
    first, third = latent(), latent(2, seed=4)
    (embeds,) = process(82, [5.0, 2.0], 0.1, 0.9, first, phantom_latent_3=third)
    assert (embeds.latent_shape, embeds.num_frames, embeds.leading_latents) == ((16, 21, HEIGHT, WIDTH), 81, 0)
    (subjects,) = embeds.payloads
    assert torch.equal(subjects.latents, torch.cat((first["samples"], third["samples"]), dim=2))
    assert (subjects.cfg, subjects.start, subjects.end) == ((5.0, 2.0), 0.1, 0.9)
    with pytest.raises(ValueError, match="different sizes"):
        process(81, 5.0, 0.0, 1.0, first, phantom_latent_2=latent(height=6))


def test_node_with_control_of_the_same_video():
    process, control = WanVideoPhantomEmbeds().process, Control()
    other = ImageEmbeds(latent_shape=(16, 22, HEIGHT, WIDTH), num_frames=81, payloads=(control,), leading_latents=1)
    (embeds,) = process(81, 5.0, 0.0, 1.0, latent(), vace_embeds=other)
    assert embeds.payloads[1] is control and embeds.latent_shape == other.latent_shape and embeds.leading_latents == 1
    with pytest.raises(ValueError, match="same width, height and num_frames"):
        process(77, 5.0, 0.0, 1.0, latent(), vace_embeds=other)
    for more in ({"modifiers": (Modifier(),)}, {"given_latents": ((0, latent()["samples"][0]),)}):
        with pytest.raises(ValueError, match="takes only their conditions"):
            process(81, 5.0, 0.0, 1.0, latent(), vace_embeds=replace(other, **more))
