"""UniLumos against diffusers' transformer on noise, foreground and background in its channels, and its node."""

from dataclasses import replace

import pytest
import torch
from published import config, published, randomized, relative, velocity
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.unilumos.extension import RelitVideo, UniLumos
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def detected(shapes):
    return [e for e in SYSTEMS.detect(shapes) if isinstance(e, UniLumos)]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_the_model_reads_both_videos_in_every_pass(batch):
    sizes = config(48)
    shapes = {k: tuple(v.shape) for k, v in WanModel(sizes).state_dict().items()}
    model = randomized(WanModel(sizes, SYSTEMS.detect(shapes)))
    front, behind = rand(1, 16, 3, 4, 6, seed=3), rand(1, 16, 3, 4, 6, seed=4)
    (embeds,) = N["WanVideoUniLumosEmbeds"]().process(9, 64, 64)
    video = replace(embeds.payloads[0], channels=torch.cat((front, behind), dim=1))
    asked = ModelInputs(
        latents=rand(batch, 16, 3, 4, 6, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=(video,),
    )  # fmt: skip
    joined = torch.cat((asked.latents, front.expand_as(asked.latents), behind.expand_as(asked.latents)), dim=1)
    assert relative(model(asked), velocity(published(model), joined, asked)) < 1e-5
    assert video.without(frozenset({"text"})) is video
    part = video.window(Window((1, 2), tuple(range(5)), total=3))
    assert torch.equal(part.channels, video.channels[:, :, 1:])
    with pytest.raises(ValueError, match=r"latents are \(2, 4, 6\) .* but the video's \(3, 4, 6\)"):
        model(replace(asked, payloads=(part,)))
    with pytest.raises(ValueError, match="3 latent frames but the video has 4"):
        video.window(Window((2, 3), tuple(range(5)), total=4))


def test_files_are_told_by_their_channels():
    text = keys_of("wan21_t2v_1_3B")
    assert detected({**text, "patch_embedding.weight": (1536, 48, 1, 2, 2)}) and not detected(text)
    for other in ("wan21_fun_control_14B", "minimaxremover_1_3B", "wan22_ti2v_5B", "wan21_i2v_14B"):
        assert not detected(keys_of(other))


def test_node():
    process = N["WanVideoUniLumosEmbeds"]().process
    front, behind = rand(1, 16, 3, 8, 12, seed=1), rand(1, 16, 3, 8, 12, seed=2)
    (embeds,) = process(10, 100, 64, {"samples": front}, {"samples": behind})
    assert (embeds.latent_shape, embeds.num_frames) == ((16, 3, 8, 12), 9)
    assert torch.equal(embeds.payloads[0].channels, torch.cat((front, behind), dim=1))
    nothing = torch.zeros_like(front)
    for given, want in (
        ({"foreground_latents": {"samples": front}}, (front, nothing)),
        ({"background_latents": {"samples": behind}}, (nothing, behind)),
    ):
        (payload,) = process(9, 96, 64, **given)[0].payloads
        assert torch.equal(payload.channels, torch.cat(want, dim=1))
    with pytest.raises(ValueError, match=r"background_latents are \(16, 2, 8, 12\).*encode the video at this size"):
        process(9, 96, 64, {"samples": front}, {"samples": behind[:, :, :2]})
    assert isinstance(embeds.payloads[0], RelitVideo) and embeds.payloads[0].encoded
