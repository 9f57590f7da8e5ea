"""MiniMax-Remover against diffusers' transformer whose attention to text adds nothing, and its node."""

from dataclasses import replace

import pytest
import torch
from published import TEXT_DIM, config, published, randomized, relative, velocity
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.minimax_remover.extension import MaskedVideo
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build():
    sizes = config(48, text_dim=0)
    shapes = {k: tuple(v.shape) for k, v in WanModel(sizes).state_dict().items()}
    model = randomized(WanModel(sizes, SYSTEMS.detect(shapes)))
    twin = randomized(WanModel(replace(sizes, text_dim=TEXT_DIM)), seed=9)
    missing = twin.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing and all("cross_attn" in k or "text_embedding" in k or "norm3" in k for k in missing)
    for block in twin.blocks:
        block.cross_attn.o.weight.zero_(), block.cross_attn.o.bias.zero_()
    return model, published(twin)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_the_model_reads_video_and_mask_and_no_text(batch):
    model, reference = build()
    video = MaskedVideo(rand(1, 32, 3, 4, 6, seed=3))
    asked = ModelInputs(
        latents=rand(batch, 16, 3, 4, 6, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, TEXT_DIM, seed=2 + row) for row in range(batch)), payloads=(video,),
    )  # fmt: skip
    joined = torch.cat((asked.latents, video.channels.expand(batch, -1, -1, -1, -1)), dim=1)
    got = model(asked)
    assert relative(got, velocity(reference, joined, asked)) < 1e-5
    assert torch.equal(got, model(replace(asked, text=tuple(rand(3, 7) for _ in range(batch)))))
    part = video.window(Window((1, 2), tuple(range(5)), total=3))
    assert torch.equal(part.channels, video.channels[:, :, 1:])
    with pytest.raises(ValueError, match=r"latents are \(2, 4, 6\) .* but the video's \(3, 4, 6\)"):
        model(replace(asked, payloads=(part,)))


def test_other_models_do_not_read_it():
    plain = WanModel(
        config(16), SYSTEMS.detect({k: tuple(v.shape) for k, v in WanModel(config(16)).state_dict().items()})
    )
    assert not plain.reads(MaskedVideo(rand(1, 32, 3, 4, 6)))


def test_node():
    process = N["WanVideoMiniMaxRemoverEmbeds"]().process
    video, mask = rand(1, 16, 3, 8, 12, seed=1), rand(1, 16, 3, 8, 12, seed=2)
    (embeds,) = process(10, 100, 64, {"samples": video}, {"samples": mask})
    assert (embeds.latent_shape, embeds.num_frames) == ((16, 3, 8, 12), 9)
    assert torch.equal(embeds.payloads[0].channels, torch.cat((video, mask), dim=1))
    with pytest.raises(ValueError, match="encode both at this size"):
        process(9, 96, 64, {"samples": video}, {"samples": mask[:, :, :2]})
