"""The sound's VAE and vocoder against float64 forms, their files, and the mel spectrum."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.ovi.sound import log_mel

spec = importlib.util.spec_from_file_location("ovi_sound_files", Path(__file__).with_name("sound_files.py"))
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


class Spectra:
    """The VAE in float64, driven by the names in its file."""

    def __init__(self, state):
        self.w = {name: value.double() for name, value in state.items()}

    def size(self, x, dim):
        return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())

    def conv(self, name, x, gain=1.0):
        weight = self.w[f"{name}.weight"]
        weight = self.size(weight.flatten(1), 1).view_as(weight) / weight[0].numel() ** 0.5
        return F.conv1d(x, weight * gain, padding=weight.shape[2] // 2)

    def silu(self, x):
        return x * torch.sigmoid(x) / 0.596

    def add(self, x, y):
        return (0.7 * x + 0.3 * y) / 0.58**0.5

    def unit(self, name, x):
        x = self.size(x, 1)
        y = self.conv(f"{name}.conv2", self.silu(self.conv(f"{name}.conv1", self.silu(x))))
        return self.add(self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x, y)

    def mid(self, side, x):
        x = self.unit(f"{side}.mid.block_1", x)
        y = self.conv(f"{side}.mid.attn_1.qkv", x)
        q, k, v = (self.size(y[:, i::3], 1) for i in range(3))
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
        x = self.add(x, self.conv(f"{side}.mid.attn_1.proj_out", (weights @ v.mT).mT))
        return self.unit(f"{side}.mid.block_2", x).clamp(-256, 256)

    def last(self, side, x):
        return self.conv(f"{side}.conv_out", self.silu(x), 1 + self.w[f"{side}.learnable_gain"])

    def encode(self, mel):
        x = self.conv("encoder.conv_in", (mel.double() - self.w["data_mean"]) / self.w["data_std"])
        for level in range(3):
            for unit in range(2):
                x = self.unit(f"encoder.down.{level}.block.{unit}", x).clamp(-256, 256)
            if level == 0:
                x = self.conv("encoder.down.0.downsample.conv1", x)
                x = self.conv("encoder.down.0.downsample.conv2", (x[..., 0::2] + x[..., 1::2]) / 2)
        return self.last("encoder", self.mid("encoder", x))[:, :20]

    def decode(self, z):
        x = self.mid("decoder", self.conv("decoder.conv_in", z.double()))
        for level in (2, 1, 0):
            for unit in range(3):
                x = self.unit(f"decoder.up.{level}.block.{unit}", x).clamp(-256, 256)
            if level == 1:
                x = self.conv("decoder.up.1.upsample.conv", x.repeat_interleave(2, -1))
        return self.last("decoder", x) * self.w["data_std"] + self.w["data_mean"]


class Waves:
    """The vocoder in float64."""

    def __init__(self, state):
        self.w = {name: value.double() for name, value in state.items()}

    def weight(self, name):
        g, v = (self.w[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        return g * v / v.flatten(1).norm(dim=1)[:, None, None]

    def conv(self, name, x, dilation=1):
        weight = self.weight(name)
        pad = dilation * (weight.shape[2] - 1) // 2
        return F.conv1d(x, weight, self.w[f"{name}.bias"], padding=pad, dilation=dilation)

    def snake(self, name, x):
        count = x.shape[1]
        up, down = (
            self.w[f"{name}.{part}.filter"].expand(count, -1, -1) for part in ("upsample", "downsample.lowpass")
        )
        stuffed = torch.zeros(*x.shape[:2], 2 * (x.shape[2] + 10), dtype=x.dtype)
        stuffed[..., ::2] = 2 * F.pad(x, (5, 5), mode="replicate")
        wide = F.conv1d(F.pad(stuffed, (11, 11)), up.flip(-1), groups=count)[..., 15 : 15 + 2 * x.shape[2]]
        alpha, beta = (self.w[f"{name}.act.{p}"].exp()[:, None] for p in ("alpha", "beta"))
        wide = wide + (wide * alpha).sin() ** 2 / (beta + 1e-9)
        return F.conv1d(F.pad(wide, (5, 6), mode="replicate"), down, groups=count)[..., ::2]

    def __call__(self, mel):
        x = self.conv("conv_pre", mel.double())
        for level, kernel in enumerate(files.VOCODER.steps):
            name = f"ups.{level}.0"
            x = F.conv_transpose1d(x, self.weight(name), self.w[f"{name}.bias"], kernel // 2, padding=kernel // 4)
            heard = []
            for unit in (2 * level, 2 * level + 1):
                y = x
                for index, dilation in enumerate((1, 3, 5)):
                    part = f"resblocks.{unit}"
                    z = self.conv(f"{part}.convs1.{index}", self.snake(f"{part}.activations.{2 * index}", y), dilation)
                    y = y + self.conv(f"{part}.convs2.{index}", self.snake(f"{part}.activations.{2 * index + 1}", z))
                heard.append(y)
            x = (heard[0] + heard[1]) / 2
        return self.conv("conv_post", self.snake("activation_post", x)).tanh()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("models"), get_host()
    files.vae_file().save(folder / "vae/vae.safetensors", torch.float32)
    files.vocoder_file().save(folder / "mmaudio/vocoder.safetensors", torch.float32)
    files.vocoder_file(old=True).save(folder / "mmaudio/old.safetensors", torch.float32)
    set_host(StandaloneHost(models=folder, device="cpu"))
    yield folder
    set_host(before)


def load(vae="vae.safetensors", vocoder="vocoder.safetensors", precision="fp32"):
    return N["OviMMAudioVAELoader"]().loadmodel(vae, vocoder, precision)[0]


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def test_latents_become_sound_and_spectra_latents_as_in_float64(folder):
    vae, state = load(), files.vae_file().tensors
    latents, mel = torch.randn(1, 20, 6), torch.randn(1, 80, 12)
    spectra = Spectra(state)
    assert relative(vae.model["vae"].decode(latents), spectra.decode(latents)) < 1e-5
    assert relative(vae.model["vae"].encode(mel), spectra.encode(mel)) < 1e-5
    want = Waves(files.vocoder_file().tensors)(mel)
    assert relative(vae.model["vocoder"](mel), want) < 1e-5
    (audio,) = N["WanVideoDecodeOviAudio"]().decode(vae, {"latent_ovi_audio": latents})
    assert audio["sample_rate"] == 16000 and audio["waveform"].shape == (1, 1, 6 * 2 * 256)
    assert relative(audio["waveform"], Waves(files.vocoder_file().tensors)(spectra.decode(latents))) < 1e-4


def test_older_names_of_normalized_weights(folder):
    new, old = (load(vocoder=name).model["vocoder"].state_dict() for name in ("vocoder.safetensors", "old.safetensors"))
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


def test_half_precision_is_near(folder):
    latents = torch.randn(1, 20, 6)
    exact, rounded = (load(precision=p).model["vae"] for p in ("fp32", "bf16"))
    assert rounded.data_mean.dtype == torch.bfloat16
    assert relative(rounded.decode(latents.bfloat16()).float(), exact.decode(latents)) < 0.1


def test_files_of_other_kinds_are_refused(folder):
    with pytest.raises(ValueError, match="vocoder.safetensors is no MMAudio VAE"):
        load(vae="vocoder.safetensors")
    with pytest.raises(ValueError, match="vae.safetensors is no BigVGAN vocoder"):
        load(vocoder="vae.safetensors")


def test_the_spectrum_is_that_of_the_definition():
    sound = torch.randn(2048, generator=torch.Generator().manual_seed(1)) * 0.6
    padded = np.pad(sound.clamp(-1, 1).double().numpy(), 384, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = [np.abs(np.fft.rfft(padded[i : i + 1024] * window)) for i in range(0, len(padded) - 1023, 256)]
    magnitude = np.sqrt(np.square(frames) + 1e-9)

    def mel(hz):
        return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / np.log(6.4))

    edges = np.interp(
        np.linspace(mel(0), mel(8000), 82), mel(np.linspace(0, 8000, 800001)), np.linspace(0, 8000, 800001)
    )
    bins = np.arange(513) * 16000 / 1024
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])[:, None]
    want = torch.from_numpy(np.log10(np.maximum(magnitude @ filters.T, 1e-5))).T
    got = log_mel(sound, 80)
    assert got.shape == (80, 8)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="shorter than 1024 samples"):
        log_mel(sound[:1000], 80)


def test_sound_is_encoded_at_any_rate(folder):
    vae, sound = load(), torch.randn(1, 2, 4096) * 0.1
    (latents,) = N["WanVideoEncodeOviAudio"]().decode(vae, {"waveform": sound, "sample_rate": 16000})
    want = Spectra(files.vae_file().tensors).encode(log_mel(sound[0].mean(0), 80)[None])
    assert relative(latents["latent_ovi_audio"], want) < 1e-4
    (faster,) = N["WanVideoEncodeOviAudio"]().decode(vae, {"waveform": sound, "sample_rate": 8000})
    assert faster["latent_ovi_audio"].shape == (1, 20, 16)


def test_samples_without_sound_are_refused(folder):
    with pytest.raises(ValueError, match="have no sound"):
        N["WanVideoDecodeOviAudio"]().decode(load(), {"samples": torch.randn(1, 48, 1, 2, 2)})
