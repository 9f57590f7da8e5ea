"""The nodes of One-to-All: what they encode, what they hand on, and a video that goes on."""

from dataclasses import replace

import pytest
import torch
from float64_wan import rand
from tiny_runs import Runs
from wanvideo_wrapper.one_to_all.continuing import TokenReplacement
from wanvideo_wrapper.one_to_all.extension import Animation
from wanvideo_wrapper.one_to_all.nodes import (
    WanVideoAddOneToAllExtendEmbeds,
    WanVideoAddOneToAllPoseEmbeds,
    WanVideoAddOneToAllReferenceEmbeds,
)
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.request import ImageEmbeds


class Other(Payload):
    needs = "none"


OTHER = Other()
EMBEDS = ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9, payloads=(OTHER,))
IMAGES = torch.rand(9, 32, 48, 4, generator=torch.Generator().manual_seed(1))


class Vae:
    """Latents that tell what was encoded: its mean, in every channel. Notes releases."""

    spatial_factor = 8

    def __init__(self):
        self.managed, self.released = self, 0

    def release(self):
        self.released += 1

    def encode(self, video):
        assert video.shape[0] == 3 and video.shape[1] == 1
        return video.mean().expand(16, 1, video.shape[2] // 8, video.shape[3] // 8)


def test_reference():
    vae, mask = Vae(), torch.zeros(1, 32, 48)
    add = WanVideoAddOneToAllReferenceEmbeds().add
    mask[:, :8] = 1
    (got,) = add(EMBEDS, vae, IMAGES, 0.8, 0.1, 0.9, mask)
    other, given = got.payloads
    picture = IMAGES[:1, ..., :3].mean() * 2 - 1
    assert other is OTHER and given.reference.shape == (1, 32, 1, 4, 6) and vae.released == 1
    torch.testing.assert_close(given.reference[0, :16], picture.expand(16, 1, 4, 6))
    torch.testing.assert_close(given.reference[0, 16:], torch.tensor(0.25 * 2 - 1).expand(16, 1, 4, 6))
    assert torch.equal(given.empty, torch.full((1, 32, 1, 4, 6), -1.0))
    assert (given.ref_strength.item(), given.ref_start, given.ref_end) == (torch.tensor(0.8).item(), 0.1, 0.9)
    # The empty mask of a picture without alpha is of no size in particular.
    for empty in (None, torch.zeros(1, 64, 64)):
        (again,) = add(got, vae, IMAGES, 0.8, 0.0, 1.0, empty)
        assert torch.equal(again.payloads[1].reference[0, 16:], again.payloads[1].empty[0, 16:])
        assert len(again.payloads) == 2
    with pytest.raises(ValueError, match="ref_mask is 64x64 but the video is 48x32"):
        add(EMBEDS, vae, IMAGES, 1.0, 0.0, 1.0, torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="ref_image is 48x16"):
        add(EMBEDS, vae, IMAGES[:, :16], 1.0, 0.0, 1.0)


def test_poses():
    add, before = WanVideoAddOneToAllPoseEmbeds().add, Animation(ref_start=0.2)
    (got,) = add(replace(EMBEDS, payloads=(before, OTHER)), IMAGES, 0.7, None, 0.1, 0.9, pose_cfg_scale=[1.5, 2.0])
    other, given = got.payloads
    assert other is OTHER and (given.ref_start, given.pose_strength) == (0.2, 0.7)
    assert (given.pose_start, given.pose_end, given.cfg) == (0.1, 0.9, (1.5, 2.0))
    torch.testing.assert_close(given.poses[0], IMAGES[..., :3].movedim(-1, 0) * 2 - 1)
    assert torch.equal(given.prefix, given.poses[:, :, :1])
    (got,) = add(EMBEDS, IMAGES, 1.0, pose_prefix_image=IMAGES[3:5])
    assert torch.equal(got.payloads[1].prefix, given.poses[:, :, 3:4]) and got.payloads[1].cfg == (1.5,)
    with pytest.raises(ValueError, match="pose_images is 32x32 but the video is 48x32"):
        add(EMBEDS, IMAGES[:, :, :32], 1.0)
    with pytest.raises(ValueError, match="pose_prefix_image is 32x32"):
        add(EMBEDS, IMAGES, 1.0, pose_prefix_image=IMAGES[:, :, :32])


@pytest.mark.parametrize(("done", "window", "wanted"), [
    (0, 4, (0, 1, 2, 3)), (3, 4, (0, 1, 2, 3)), (7, 4, (2, 3, 4, 5)), (11, 5, (6, 7, 8, 8, 8)),
])  # fmt: skip
def test_the_part_that_comes_next(done, window, wanted):
    earlier = {"samples": rand(2, 16, 1, 4, 6)}
    embeds, poses = WanVideoAddOneToAllExtendEmbeds().add(
        EMBEDS, earlier, "pad_with_last", window, 5, done, pose_images=IMAGES
    )
    assert torch.equal(poses, IMAGES[list(wanted)][..., :3])
    (given,) = embeds.modifiers
    assert torch.equal(given.latents, earlier["samples"][:1]) and embeds.payloads == (OTHER,)
    again, none = WanVideoAddOneToAllExtendEmbeds().add(embeds, earlier, "error")
    assert len(again.modifiers) == 1 and none.shape == (1, 64, 64, 3)


def test_poses_that_end_too_early():
    add, earlier = WanVideoAddOneToAllExtendEmbeds().add, {"samples": rand(1, 16, 1, 4, 6)}
    with pytest.raises(ValueError, match="needs the poses 6 to 9 but pose_images has 9"):
        add(EMBEDS, earlier, "error", 4, 5, 11, pose_images=IMAGES)
    with pytest.raises(ValueError, match="needs the poses 9 to 12"):
        add(EMBEDS, earlier, "pad_with_last", 4, 5, 14, pose_images=IMAGES)


def test_the_video_goes_on_from_frames_that_stay(tmp_path):
    earlier = {"samples": rand(1, 16, 2, 4, 4)}
    plain = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9)
    embeds, _ = WanVideoAddOneToAllExtendEmbeds().add(plain, earlier, "error")
    with Runs(tmp_path) as runs:
        times = []
        embedding = runs.model.transformer.time_embedding
        embedding.register_forward_pre_hook(lambda module, given: times.append(given[0].shape[1]))
        got = runs.sample(image_embeds=embeds)
        assert torch.equal(got[:, :2], earlier["samples"][0]) and got[:, 2:].isfinite().all()
        assert set(times) == {3}
        assert not torch.allclose(got[:, 2], runs.sample(image_embeds=plain)[:, 2], atol=1e-2)
        with pytest.raises(ValueError, match="prev_latents have 2 latent frames and the video has no more"):
            runs.sample(image_embeds=replace(embeds, latent_shape=(16, 2, 4, 4), num_frames=5))
        with pytest.raises(ValueError, match="same width and height"):
            runs.sample(image_embeds=replace(plain, modifiers=(TokenReplacement(rand(1, 16, 1, 4, 6)),)))
