"""The speech encoder against transformers, and the files it takes."""

import json

import numpy as np
import pytest
import torch
from contract import TESTS
from torch.nn.functional import interpolate
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from wanvideo_wrapper.demo.tiny import Tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.humo.whisper import load_whisper

SIZES = dict(
    d_model=32, encoder_layers=8, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=16,
    max_source_positions=100, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=32,
    pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
)  # fmt: skip
HOST = StandaloneHost(device="cpu")


def model(**changes):
    torch.manual_seed(0)
    return WhisperModel(WhisperConfig(**{**SIZES, **changes})).eval()


def save(whole, path, prefix="model.", keep=lambda name: name.startswith("encoder."), heads="2"):
    tensors = {prefix + name: value.detach() for name, value in whole.named_parameters() if keep(name)}
    Tiny(tensors=tensors, metadata={"wanvideo.num_heads": heads}).save(path, torch.float32)
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return load_whisper(
        save(model(), tmp_path_factory.mktemp("w") / "whisper.safetensors"), dtype=torch.float32, host=HOST
    )


def sound(samples, seed=0):
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * 0.1


@torch.no_grad()
def expected(whole, heard):
    """Pieces of two seconds, all layers of each, then levels at 25 a second."""
    mel = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    states = []
    for start in range(0, len(heard), 32000):
        features = mel(heard[start : start + 32000], sampling_rate=16000, return_tensors="pt").input_features
        x = torch.nn.functional.gelu(whole.encoder.conv1(features))
        x = torch.nn.functional.gelu(whole.encoder.conv2(x)).transpose(1, 2) + whole.encoder.embed_positions.weight
        layers = [x]
        for layer in whole.encoder.layers:
            out = layer(layers[-1], None)
            layers.append(out if isinstance(out, torch.Tensor) else out[0])
        layers[-1] = whole.encoder.layer_norm(layers[-1])
        states.append(torch.stack(layers, dim=2))
    states = torch.cat(states, dim=1)[:, : len(heard) // 640 * 2]
    levels = [states[:, :, i : i + 2].mean(dim=2) for i in range(0, 8, 2)] + [states[:, :, 8]]
    at_25 = [interpolate(x.transpose(1, 2), size=int(x.shape[1] / 50.0 * 25), mode="linear", align_corners=True)
             for x in levels]  # fmt: skip
    return torch.stack(at_25, dim=-1)[0].permute(1, 2, 0)


@pytest.mark.parametrize("samples", [640, 16000, 32000, 32001, 75000])
def test_features_are_those_of_transformers(whisper, samples):
    heard = sound(samples)
    got, want = whisper.encode(heard), expected(model(), heard)
    assert got.shape == want.shape and got.shape[1:] == (5, 32)
    assert ((got - want).norm() / want.norm()).item() < 1e-5 and got.dtype == torch.float32


def test_half_precision_is_kept_while_it_encodes(whisper, tmp_path):
    half = load_whisper(save(model(), tmp_path / "w.safetensors"), dtype=torch.float16, host=HOST)
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    got, want = half.encode(sound(16000)), whisper.encode(sound(16000))
    assert torch.equal(got, got.half().float()) and (got - want).norm() < 0.02 * want.norm()


def test_the_whole_model_and_bare_names_load_too(whisper, tmp_path):
    heard = sound(9000)
    for name, options in (("whole", {"keep": lambda _: True}), ("bare", {"prefix": ""})):
        other = load_whisper(save(model(), tmp_path / f"{name}.safetensors", **options), dtype=torch.float32, host=HOST)
        assert torch.equal(other.encode(heard), whisper.encode(heard))


def test_names_are_the_published_ones(whisper):
    published = json.loads((TESTS / "data/checkpoints/whisper_large_v3_encoder.json").read_text())
    names = {key.replace("{i}", "0") for key in published if key != "_meta"}
    assert names == {
        f"model.encoder.{name}" for name, _ in whisper.model.named_parameters()
        if not name.startswith("layers.") or name.startswith("layers.0.")
    }  # fmt: skip


def test_wrong_files_are_named(tmp_path):
    def load(path):
        return load_whisper(path, dtype=torch.float32, host=HOST)

    other = tmp_path / "other.safetensors"
    Tiny(tensors={"a.weight": torch.randn(3, 3)}).save(other)
    with pytest.raises(ValueError, match=r"other\.safetensors is no Whisper encoder"):
        load(other)
    with pytest.raises(ValueError, match="6 layers and 100 positions.*large-v3"):
        load(save(model(encoder_layers=6), tmp_path / "six.safetensors"))
    with pytest.raises(ValueError, match="8 layers and 90 positions.*large-v3"):
        load(save(model(max_source_positions=90), tmp_path / "short.safetensors"))
    part = save(
        model(), tmp_path / "part.safetensors", keep=lambda name: name.startswith("encoder.") and "fc1" not in name
    )
    with pytest.raises(ValueError, match="lacks 16 of the .* tensors of a Whisper encoder"):
        load(part)


def test_sound_shorter_than_a_frame_is_named(whisper):
    with pytest.raises(ValueError, match="shorter than a video frame"):
        whisper.encode(sound(639))
