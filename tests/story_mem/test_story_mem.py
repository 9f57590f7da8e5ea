"""StoryMem: positions against angles in float64, the condition, and a run."""

from dataclasses import replace

import pytest
import torch
from contract import build, inputs
from sampler_stand_in import FakeHost, FakeModel, GaussianTransformer, config, rand, request
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.story_mem.extension import MemoryPositions, StoryMem
from wanvideo_wrapper.wanvideo.images import to_video
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample


def test_memory_lies_before_the_video():
    _, model = build(StoryMem())
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[1].rope))
    model(inputs(MemoryPositions(2, 5)))
    sides = 2 * (12 // 6)
    frequencies = 10000.0 ** (-torch.arange(0, 12 - 2 * sides, 2, dtype=torch.float64) / (12 - 2 * sides))
    for token, turned in enumerate(seen[0]):
        place = (-10, -5, 0)[token // 4]
        angles = place * frequencies
        want = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
        torch.testing.assert_close(turned[: len(frequencies)], want, atol=1e-6, rtol=1e-6)
    model(inputs())
    assert torch.equal(seen[0][:, len(frequencies) :], seen[1][:, len(frequencies) :])
    assert not torch.equal(seen[0], seen[1])


class FakeVae:
    """Latents are means of 8x8 pixels, in as many channels as there are."""

    spatial_factor = 8

    def __init__(self):
        self.managed, self.released = self, 0

    def encode(self, video, *, tile=None, quiet=False):
        assert video.shape[1] == 1
        return torch.nn.functional.avg_pool2d(video, 8).repeat(6, 1, 1, 1)[:16]

    def release(self):
        self.released += 1


def embeds(offset=True, frames=5, payloads=None, images=3):
    picture = ImageCondition(rand(1, 16, 3, 4, 6, seed=1), rand(1, 4, 3, 4, 6, seed=2))
    image = ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9, payloads=(picture,) if payloads is None else payloads)
    vae, pictures = FakeVae(), torch.rand(images, 40, 56, 3)
    made = N["WanVideoAddStoryMemLatents"]().add(vae, image, pictures, offset, frames)[0]
    assert vae.released == 1
    return made, picture, pictures


def test_node():
    made, picture, images = embeds()
    condition, positions = made.payloads
    memory = torch.cat([FakeVae().encode(to_video(image[None], 48, 32)) for image in images], dim=1)
    assert torch.equal(condition.cond[0], torch.cat((memory, picture.cond[0]), dim=1))
    assert torch.equal(condition.mask[:, :, 3:], picture.mask) and (condition.mask[:, :, :3] == 1).all()
    assert positions == MemoryPositions(3, 5)
    assert (made.latent_shape, made.num_frames, made.leading_latents) == ((16, 6, 4, 6), 9, 3)
    for plain in (embeds(offset=False)[0], embeds(frames=0)[0]):
        assert len(plain.payloads) == 1 and plain.leading_latents == 3
    with pytest.raises(ValueError, match="in front of a start picture"):
        embeds(payloads=())
    with pytest.raises(ValueError, match=r"memory is \(16, 3, 4, 6\)"):
        embeds(payloads=(ImageCondition(rand(1, 16, 3, 4, 4), rand(1, 4, 3, 4, 4)),))


def test_the_result_is_the_video_without_memory():
    made, _, _ = embeds()
    transformer = GaussianTransformer(config(in_dim=36), (ImageToVideo(), StoryMem()))
    model = FakeModel(transformer)
    found, estimate = sample(request(model, image=made), FakeHost())
    assert transformer.calls[0].latents.shape == (1, 16, 6, 4, 6)
    assert found["samples"].shape == estimate["samples"].shape == (1, 16, 3, 4, 6)
    assert found["has_ref"] == 0
    whole = sample(request(FakeModel(GaussianTransformer(config(in_dim=36), (ImageToVideo(), StoryMem()))),
                           image=replace(made, modifiers=())), FakeHost())[0]  # fmt: skip
    assert torch.equal(whole["samples"][:, :, 3:], found["samples"]) and whole["has_ref"] == 3
