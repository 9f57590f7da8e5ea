"""The forms that training uses in place of the inference code give the same numbers."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.demo.train import sizes, talk, whole_clip
from wanvideo_wrapper.demo.train import trainer as trainer_module
from wanvideo_wrapper.demo.train.gradients import Gradients, backward
from wanvideo_wrapper.demo.train.stages import new_transformer
from wanvideo_wrapper.demo.train.trainer import Trainer
from wanvideo_wrapper.demo.train.vae import PAIR_SHARE, Pictures, loss, normalize
from wanvideo_wrapper.demo.train.whole_clip import WholeClip, fused_normed, normed
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.modules.vae import MEAN_21, STD_21, build_vae, load_vae

pytestmark = pytest.mark.autograd


class Take:
    """Stands in for a stretch of speech: what a mouth does."""

    mouth = np.random.default_rng(np.random.randint(2**31)).random(400)


class CornersOfPictures(Pictures):
    """Small ones: what is tested depends on no size."""

    def draw(self, count, frames, people):
        clips, weights = super().draw(count, frames, people)
        return clips[..., 40:72, 40:72], weights[..., 40:72, 40:72]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(torch.seed() % 2**31)
    return build_vae(sizes.VAE).requires_grad_(False)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_a_whole_clip_equals_the_streamed_form(vae, frames, tmp_path):
    tiny.vae_file(vae, sizes.VAE).save(tmp_path / "vae.safetensors", torch.float32)
    streamed = load_vae(tmp_path / "vae.safetensors", dtype=torch.float32, host=StandaloneHost(device="cpu"))
    clip = torch.rand(3, frames, 32, 32) * 2 - 1
    mean, std = (torch.tensor(t).view(-1, 1, 1, 1) for t in (MEAN_21, STD_21))
    whole = WholeClip(vae)
    latents = (whole.encode(clip[None])[0, : whole_clip.Z_DIM] - mean) / std
    want = streamed.encode(clip)
    assert (latents - want).norm() < 1e-4 * want.norm()
    decoded, made = streamed.decode(want), whole.decode((want * std + mean)[None])[0]
    assert (made - decoded).norm() < 1e-4 * decoded.norm()


@pytest.mark.slow
def test_the_compiled_norm_equals_the_plain_one():
    for channels, rows in ((16, 64), (16, 640), (32, 100)):
        x, gamma = torch.randn(rows, channels, requires_grad=True), torch.randn(channels, requires_grad=True)
        got, want = fused_normed(x, gamma), normed(x, gamma)
        assert torch.allclose(got, want, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, gamma)) for y in (got, want)), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_normalizing_the_latents_changes_no_reconstruction(vae):
    pictures = CornersOfPictures([Take()], torch.device("cpu"))
    whole, clip = WholeClip(vae), pictures.draw(1, 5, 1)[0]
    before = whole.decode(whole.encode(clip)[:, : whole_clip.Z_DIM])
    normalize(vae, pictures)
    moments = whole.encode(torch.cat([pictures.draw(4, 33, 1)[0] for _ in range(2)]))[:, : whole_clip.Z_DIM]
    after = whole.decode(whole.encode(clip)[:, : whole_clip.Z_DIM])
    assert (after - before).norm() < 1e-3 * before.norm()
    spread = moments.movedim(1, 0).flatten(1).std(1) / torch.tensor(STD_21)
    assert (spread > 0.5).all() and (spread < 2).all()


def test_few_padding_keys_stand_for_all(vae):
    text_len, lengths = 512, (3, 9, 14)
    texts = [torch.randn(length, 8) for length in lengths]
    prompts = talk.Prompts(texts, text_len)
    numbers = torch.arange(talk.BATCH) % len(texts)
    keys, values, q = torch.randn(8, 2 * 16), torch.randn(8, 2 * 16), torch.randn(talk.BATCH, 5, 2, 16)
    chosen = prompts.choose(numbers)
    got = prompts(q, *((chosen @ weight).unflatten(-1, (2, 16)) for weight in (keys, values)))
    padded = torch.stack([F.pad(texts[n], (0, 0, 0, text_len - len(texts[n]))) for n in numbers.tolist()])
    want = sdpa()(q, *((padded @ weight).unflatten(-1, (2, 16)) for weight in (keys, values)))
    assert (got - want).norm() < 1e-5 * want.norm()


def test_patches_as_a_product_equal_the_convolution():
    model = new_transformer()
    x = torch.randn(2, sizes.TRANSFORMER.in_dim, 3, 8, 6)
    patches = model.patch_embedding
    want = F.conv3d(x, patches.weight, patches.bias, stride=patches.stride)
    assert torch.allclose(patches(x), want, atol=1e-5)


def test_the_loss_falls_and_training_goes_on_from_its_file(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])

    def error():
        return F.mse_loss(model(x), y)

    # A clock that ticks, so that the number of steps does not depend on the machine.
    ticks = itertools.count()
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: next(ticks) * 1e-4)
    before = float(error().detach())
    trainer = Trainer(model, tmp_path / "it.resume.safetensors", seconds=0.5, rate=1e-2)
    trainer.run(lambda: backward(model, error))
    fresh = torch.nn.Linear(4, 1)
    trainer = Trainer(fresh, tmp_path / "it.resume.safetensors", seconds=0.5, rate=1e-2)
    assert trainer.used >= 0.5 and float(F.mse_loss(fresh(x), y).detach()) < before / 4


def test_a_step_of_the_vae_reaches_every_weight():
    model = build_vae(sizes.VAE)
    pictures = Pictures([Take()], torch.device("cpu"))
    clips, weights = pictures.keep(2, 5).batch(1)
    loss(WholeClip(model), clips[..., 40:72, 40:72], weights[..., 40:72, 40:72]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_gradients_by_form_are_those_of_a_plain_backward(device):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).to(device)

    def loss_of(form, x, network=model):
        return network(x).square().mean() if form else network(x).abs().mean()

    gradients = Gradients(model, loss_of)
    for form in (0, 1, 0, 1):
        x = torch.randn(5 + form, 6)
        found = float(gradients(form, x))
        got = [p.grad.clone() for p in model.parameters()]
        # On a copy: a graph of the model itself that is still alive would be waited for while the next is captured.
        twin = copy.deepcopy(model)
        want = loss_of(form, x.to(device), twin)
        assert found == pytest.approx(want.item(), rel=1e-4)
        for a, b in zip(got, torch.autograd.grad(want, twin.parameters()), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        # The next step sees the weights that an optimizer has changed meanwhile.
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), got, strict=True):
                parameter -= 0.1 * gradient


def test_kept_clips_are_the_drawn_ones():
    kept, drawn = (Pictures([Take()], torch.device("cpu")) for _ in range(2))
    kept = kept.keep(3, 5)
    people = 2 if float(drawn.dice.between(0, 1)) < PAIR_SHARE else 1
    assert (drawn.draw(3, 5, people)[0].movedim(1, -1) - (kept.pixels / 127.5 - 1)).abs().amax() < 1 / 255 + 1e-6
    clips, weights = kept.batch(2)
    assert kept.pixels.shape == (3, 5, 128, 128, 3) and clips.shape == (2, 3, 5, 128, 128)
    assert clips.is_contiguous(memory_format=torch.channels_last_3d) and -1 <= clips.min() < clips.max() <= 1
    assert weights.shape == (2, 1, 1, 128, 128) and 1 == weights.min() < weights.max()
    rows = kept.pixels.movedim(-1, 1) / 127.5 - 1
    for clip in clips:
        assert sum(bool((clip - row).abs().amax() < 1e-6) for row in rows) == 1
