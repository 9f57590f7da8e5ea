"""FlashVSR's features against the published stream in float64, and what is added to the tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import build, inputs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.flashvsr.extension import FlashVsr, LowQuality
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.request import ImageEmbeds

SYSTEM = FlashVsr(hidden=(8, 12), layers=2)
VIDEO = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
# As the node gives it: the last frame four times.
GIVEN = torch.cat((VIDEO, VIDEO[:, :, -1:].expand(-1, -1, 3, -1, -1)), dim=2)


@pytest.fixture(scope="module")
def model():
    return build(SYSTEM)[1]


def published(module, video):
    """As the authors stream a video: the first frame four times and more, a group of four, its convolutions' caches."""
    w = {name: value.double() for name, value in module.state_dict().items()}
    video = torch.cat((video[:, :, :1], video, video[:, :, -1:].expand(-1, -1, 3, -1, -1)), dim=2).double()
    video = torch.cat((video[:, :, :1].expand(-1, -1, 3, -1, -1), video), dim=2)

    def step(number, x):
        x = F.pad(torch.cat((x[:, :, -2:], x), dim=2), (1, 1, 1, 1, 0, 0), mode="replicate")
        x = F.conv3d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], stride=(2, 1, 1))
        x = x / x.pow(2).sum(1, keepdim=True).sqrt() * x.shape[1] ** 0.5 * w[f"norm{number}.gamma"]
        return x / (1 + (-x).exp())

    groups = []
    for start in range(4, video.shape[2], 4):
        pixels = video[:, :, start : start + 4]
        b, c, f, h, w_ = pixels.shape
        cells = pixels.reshape(b, c, f, h // 16, 16, w_ // 16, 16).permute(0, 1, 4, 6, 2, 3, 5)
        groups.append(step(2, step(1, cells.reshape(b, c * 256, f, h // 16, w_ // 16))))
    return torch.cat(groups, dim=2).flatten(2).transpose(1, 2)


def test_features_are_those_of_the_published_stream(model):
    want = published(model.LQ_proj_in, VIDEO)
    got = model.LQ_proj_in.features(GIVEN)
    assert got.shape == (1, 12, 12) and got.is_contiguous()
    assert ((got - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_each_of_the_first_blocks_gets_its_own(model, strength):
    entered, left, handles = [], [], []
    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(lambda b, a: entered.append(a[0])))
        handles.append(block.register_forward_hook(lambda b, a, out: left.append(out)))
    plain = model._embed(inputs().latents, inputs()).x
    model(inputs(LowQuality(GIVEN, torch.tensor(strength))))
    for handle in handles:
        handle.remove()
    features = published(model.LQ_proj_in, VIDEO).float()
    first, second = (layer(features) * strength for layer in model.LQ_proj_in.linear_layers)
    torch.testing.assert_close(entered[0], plain + first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entered[1], left[0] + second, rtol=1e-4, atol=1e-5)
    assert torch.equal(entered[2], left[1])


def test_frames_of_another_size_or_too_few_are_refused(model):
    payload = LowQuality(GIVEN, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(12, 32, 16\) but the video is \(12, 32, 32\)"):
        model(inputs(replace(payload, frames=GIVEN[..., :16])))
    with pytest.raises(ValueError, match="for 3 latent frames but the video has 4"):
        payload.window(Window((2, 3), (9,), total=4))


def test_windows_have_the_features_of_their_latents(model):
    """Of the frames behind the last latent, too, where the video goes on."""
    payload, whole = LowQuality(GIVEN, torch.tensor(1.0)), published(model.LQ_proj_in, VIDEO).unflatten(1, (3, 4))
    for places in ((0, 1), (1, 2), (2, 0)):
        part = payload.window(Window(places, tuple(range(5)), total=3))
        got = model.LQ_proj_in.features(part.frames).unflatten(1, (2, 4))
        torch.testing.assert_close(got.double(), whole[:, list(places)], rtol=1e-4, atol=1e-5)


def test_the_node_takes_the_frames_of_the_video():
    node = NODE_CLASS_MAPPINGS["WanVideoAddFlashVSRInput"]()
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9)
    images = torch.rand(12, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    (once,) = node.add(embeds, images, 0.5)
    (payload,) = node.add(once, images, 0.7)[0].payloads
    want = images[[*range(9), 8, 8, 8]].movedim(-1, 0) * 2 - 1
    torch.testing.assert_close(payload.frames[0], want)
    assert float(payload.strength) == pytest.approx(0.7) and embeds.payloads == ()
    with pytest.raises(ValueError, match="images are 5 but the video has 9"):
        node.add(embeds, images[:5], 1.0)
