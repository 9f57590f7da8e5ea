"""The node that encodes control videos: what the model gets of them, with a tiny VAE."""

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.longvie2.extension import DualControl
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds

HOST = StandaloneHost(device="cpu")
EMBEDS = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9)
RANGE = (0.5, 0.1, 0.6, 0.9)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    tiny.vae(base_dim=4).save(path, torch.float32)
    return load_vae(path, dtype=torch.float32, host=HOST)


def pictures(frames, seed):
    return torch.rand(frames, 32, 32, 3, generator=torch.Generator().manual_seed(seed))


def added(vae, embeds=EMBEDS, **videos):
    return NODE_CLASS_MAPPINGS["WanVideoAddDualControlEmbeds"]().add(embeds, vae, *RANGE, **videos)[0]


def encoded(vae, images):
    return vae.encode(images.movedim(-1, 0) * 2 - 1)


def test_videos_are_latents_with_a_mask_and_their_first_frame_alone(vae):
    dense, sparse = pictures(9, 1), pictures(9, 2)
    payload = added(vae, dense=dense, sparse=sparse).payloads[0]
    for got, video in ((payload.dense, 1 - dense), (payload.sparse, sparse)):
        first = torch.full_like(video, 0.5)
        first[0] = video[0]
        mask = torch.zeros(4, 3, 4, 4)
        mask[:, 0] = 1
        torch.testing.assert_close(got[0], torch.cat((encoded(vae, video), mask, encoded(vae, first))))
    assert (float(payload.strength), payload.start, payload.end) == RANGE[:3]
    assert payload.history is None


def test_of_the_frames_before_the_first_4n_1_count(vae):
    before = pictures(8, 3)
    made = added(vae, sparse=pictures(9, 2), prev_images=before)
    (payload,), (continuation,) = made.payloads, made.modifiers
    assert continuation.history is payload.history and continuation.noise_level == RANGE[3]
    torch.testing.assert_close(payload.history[0], encoded(vae, before[:5]))
    assert payload.dense is None


def test_a_second_one_takes_the_place_of_the_first_and_one_video_is_needed(vae):
    once = added(vae, dense=pictures(9, 1))
    twice = added(vae, once, sparse=pictures(9, 2))
    assert [type(p) for p in twice.payloads] == [DualControl] and twice.payloads[0].dense is None
    assert twice.modifiers == ()
    assert once.payloads[0].dense is not None and EMBEDS.payloads == ()
    with pytest.raises(ValueError, match="connect 'dense'"):
        added(vae)
