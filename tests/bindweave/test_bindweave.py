"""BindWeave against diffusers' transformer on all frames in their order, and its node."""

from dataclasses import replace

import pytest
import torch
from published import config, published, randomized, relative, velocity
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.bindweave.extension import BindWeave, SubjectFrames
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.tokens import ModelInputs, Text

FRAMES, HEIGHT, WIDTH, FEATURES = 3, 4, 6, 10


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONDITION = ImageCondition(rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=4), rand(1, 4, FRAMES, HEIGHT, WIDTH, seed=5))
SUBJECTS = SubjectFrames(rand(1, 20, 4, HEIGHT, WIDTH, seed=6))


def build():
    model = randomized(WanModel(config(36), (BindWeave(FEATURES), ImageToVideo())))
    return model, published(model, "text_projection.")


def inputs(*payloads, batch=1):
    return ModelInputs(
        latents=rand(batch, 16, FRAMES, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip


def whole(latents, subjects):
    """Frames in front without noise, then the video: what the authors give to the model."""
    count = latents.shape[0]
    noise = torch.cat((torch.zeros(count, 16, 4, HEIGHT, WIDTH), latents), dim=2)
    video = torch.cat((CONDITION.mask, CONDITION.cond), dim=1)
    condition = torch.cat((subjects.frames, video), dim=2).expand(count, -1, -1, -1, -1)
    return torch.cat((noise, condition), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_subjects_are_frames_before_the_video(batch):
    model, reference = build()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].is_contiguous()))
    asked = inputs(CONDITION, SUBJECTS, batch=batch)
    want = velocity(reference, whole(asked.latents, SUBJECTS), asked)[:, :, 4:]
    assert relative(model(asked), want) < 1e-5 and all(seen)
    assert relative(model(replace(asked, payloads=(CONDITION,))), want) > 1e-3


@torch.no_grad()
def test_hidden_states_come_before_the_prompt():
    """As if the projected states were embedded tokens of the prompt."""
    model, _ = build()
    hidden = rand(1, 7, FEATURES, seed=8)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[1].text))
    model(inputs(CONDITION, replace(SUBJECTS, text=hidden), batch=2))
    model(inputs(CONDITION, SUBJECTS, batch=2))
    first, _, second = model.text_projection
    middle = hidden.double() @ first.weight.double().T + first.bias.double()
    middle = torch.nn.functional.gelu(middle, approximate="tanh")
    want = (middle @ second.weight.double().T + second.bias.double()).expand(2, -1, -1)
    got, plain = seen[0].tokens, seen[1].tokens
    assert type(seen[0]) is Text and relative(got[:, :7], want.float()) < 1e-5
    assert torch.equal(got[:, 7:], plain)
    with pytest.raises(ValueError, match="3 features but the model reads 10"):
        model(inputs(CONDITION, replace(SUBJECTS, text=rand(1, 7, 3))))


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, rand(1, 4, FEATURES, seed=9)])
def test_passes_without_the_prompt_read_the_negative_states(negative):
    model, _ = build()
    subjects = replace(SUBJECTS, text=rand(1, 7, FEATURES, seed=8), negative=negative)
    positive, other, latents = rand(5, 20, seed=2), rand(4, 20, seed=3), inputs().latents[0]
    for batched in (False, True):
        denoiser = Denoiser(
            model, Conditions(positive=positive, negative=other, payloads=(CONDITION, subjects)),
            guidance=Guidance(cfg=(5.0,), batched=batched), device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        got = denoiser(latents, torch.tensor(731.0), Step(index=3, total=10))
        with_all = model(inputs(CONDITION, subjects))[0]
        without = model(replace(inputs(CONDITION, replace(SUBJECTS, text=negative)), text=(other,)))[0]
        torch.testing.assert_close(got, without + 5.0 * (with_all - without), rtol=1e-4, atol=1e-5)


def test_files_are_told_by_the_projection():
    model, _ = build()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert BindWeave(FEATURES) in SYSTEMS.detect(shapes) and not SYSTEMS.missing(shapes)


@torch.no_grad()
def test_what_does_not_fit_the_model_is_named():
    model, _ = build()
    with pytest.raises(ValueError, match="16 channels besides the noise, but the model reads 20"):
        model(inputs(CONDITION, SubjectFrames(rand(1, 16, 4, HEIGHT, WIDTH))))
    with pytest.raises(ValueError, match=r"give \(3, 3\) patches"):
        model(inputs(CONDITION, SubjectFrames(rand(1, 20, 4, 6, WIDTH))))


def embeds(*more):
    return ImageEmbeds(latent_shape=(16, FRAMES, HEIGHT, WIDTH), num_frames=9, payloads=(CONDITION, *more))


def test_node():
    pictures, masks = rand(2, 16, 1, HEIGHT, WIDTH, seed=7), (rand(2, 32, 48, seed=8) > 0).float()
    states, clip = rand(1, 7, FEATURES), ClipImage(rand(1, 257, 6))
    add = N["WanVideoAddBindweaveEmbeds"]().add
    made, preview, shown = add(embeds(clip), {"samples": pictures}, masks, states)
    condition, padded, subjects = made.payloads
    assert condition is CONDITION and torch.equal(subjects.text, states) and subjects.negative is None
    assert padded.positive.shape == (1, 1028, 6) and torch.equal(padded.positive[:, :257], clip.positive)
    assert not padded.positive[:, 257:].any() and padded.negative is None
    for frame in range(4):
        got = subjects.frames[0, :, frame]
        if frame < 2:
            assert torch.equal(got[4:], pictures[frame, :, 0]) and torch.equal(got[0], masks[frame, ::8, ::8])
            assert not got[1:4].any()
        else:
            assert not got.any()
    assert torch.equal(preview["samples"], torch.cat((subjects.frames[:, 4:], CONDITION.cond), dim=2))
    assert torch.equal(shown, torch.cat((subjects.frames[0, 0], CONDITION.mask[0, 0])))
    plain = add(embeds(), {"samples": pictures})[0].payloads[1]
    assert (plain.frames[0, :4, :2] == 1).all() and not plain.frames[0, :, 2:].any()


@pytest.mark.parametrize(
    ("image", "pictures", "masks", "message"),
    [
        (ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9), 1, None, "connect the image embeds"),
        (embeds(), 5, None, "takes 1 to 4 pictures"),
        (embeds(), 2, torch.ones(1, 32, 48), "1 ref_masks for 2 pictures"),
    ],
)
def test_what_the_node_cannot_use_is_named(image, pictures, masks, message):
    with pytest.raises(ValueError, match=message):
        N["WanVideoAddBindweaveEmbeds"]().add(image, {"samples": rand(pictures, 16, 1, HEIGHT, WIDTH)}, masks)
