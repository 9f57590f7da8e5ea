"""Lucy Edit against diffusers' transformer on noise and video in its channels."""

from dataclasses import replace

import pytest
import torch
from published import config, published, randomized, relative, velocity
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.fun_control.extension import ControlSignal
from wanvideo_wrapper.lucy_edit.nodes import EditedVideo
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.tokens import ModelInputs


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(frames=3, payloads=()):
    image = ImageEmbeds(latent_shape=(16, 3, 8, 12), num_frames=9, payloads=payloads)
    return N["WanVideoAddLucyEditLatents"]().add(image, {"samples": rand(1, 48, frames, 4, 6, seed=3)})[0]


@torch.no_grad()
def test_the_model_reads_the_video_beside_the_noise():
    sizes = replace(config(96), out_dim=48)
    shapes = {k: tuple(v.shape) for k, v in WanModel(sizes).state_dict().items()}
    model = randomized(WanModel(sizes, SYSTEMS.detect(shapes)))
    (video,) = embeds().payloads
    asked = ModelInputs(
        latents=rand(1, 48, 3, 4, 6, seed=1), timestep=torch.tensor([731.0]), text=(rand(5, 20, seed=2),),
        payloads=(video,), step=Step(index=3, total=10),
    )  # fmt: skip
    want = velocity(published(model), torch.cat((asked.latents, video.video), dim=1), asked)
    assert model.reads(video) and relative(model(asked), want) < 1e-5
    part = video.window(Window((1, 2), tuple(range(5)), total=3))
    windowed = replace(asked, latents=asked.latents[:, :, 1:], payloads=(part,))
    want = velocity(published(model), torch.cat((windowed.latents, video.video[:, :, 1:]), dim=1), windowed)
    assert relative(model(windowed), want) < 1e-5
    with pytest.raises(ValueError, match="same number of frames|has latents"):
        model(replace(asked, payloads=(EditedVideo(rand(1, 48, 2, 4, 6)),)))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="connect only one"):
        embeds(payloads=(ControlSignal(rand(1, 16, 3, 4, 6)),))
    sizes = config(16)
    plain = randomized(
        WanModel(sizes, SYSTEMS.detect({k: tuple(v.shape) for k, v in WanModel(sizes).state_dict().items()}))
    )
    (video,) = embeds().payloads
    assert not plain.reads(video) and "96 channels" in video.needs
