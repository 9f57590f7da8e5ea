"""The node that is kept for old graphs gives what the two in its place give."""

from types import SimpleNamespace

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.image_to_video.extension import ImageCondition

FEATURES = torch.randn(1, 5, 8)
CLIP = SimpleNamespace(encode_image=lambda images, crop: SimpleNamespace(penultimate_hidden_states=FEATURES))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    before = get_host()
    models = tmp_path_factory.mktemp("models")
    tiny.vae(base_dim=4).save(models / "vae/vae.safetensors")
    set_host(StandaloneHost(models=models, device="cpu"))
    yield N["WanVideoVAELoader"]().loadmodel("vae.safetensors", "fp32")[0]
    set_host(before)


def encode(vae, image, width=48, height=32, frames=9, **options):
    (embeds,) = N["WanVideoImageClipEncode"]().process(CLIP, vae, image, frames, width, height, **options)
    condition, clip = embeds.payloads
    assert isinstance(condition, ImageCondition) and isinstance(clip, ClipImage)
    return embeds, condition, clip


def test_equals_the_nodes_of_today(vae):
    image = torch.rand(1, 64, 96, 3)
    embeds, condition, clip = encode(vae, image, noise_aug_strength=0.3, clip_embed_strength=0.5)
    (wanted,) = N["WanVideoImageToVideoEncode"]().process(48, 32, 9, True, 0.3, 1.0, 1.0, vae=vae, start_image=image)
    (today,) = wanted.payloads
    torch.testing.assert_close(condition.cond, today.cond)
    assert torch.equal(condition.mask, today.mask) and torch.equal(clip.positive, FEATURES * 0.5)
    assert embeds.latent_shape == wanted.latent_shape and embeds.num_frames == wanted.num_frames == 9


def test_strength_is_of_the_picture_and_the_size_follows_it(vae, monkeypatch):
    seen, real = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda video, **o: seen.append(video) or real(video, **o))
    image = torch.rand(1, 32, 128, 4)
    assert encode(vae, image, latent_strength=0.5)[0].latent_shape == (16, 3, 2, 8)
    assert encode(vae, image, width=40, frames=11, adjust_resolution=False)[0].latent_shape == (16, 3, 4, 4)
    assert seen[0].shape == (3, 9, 16, 64) and seen[0][:, 1:].abs().max() == 0
    encode(vae, image)
    torch.testing.assert_close(seen[0][:, 0], seen[2][:, 0] * 0.5)
    with pytest.raises(ValueError, match="takes one start picture but got 2"):
        encode(vae, torch.rand(2, 32, 32, 3))
