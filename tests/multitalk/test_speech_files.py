"""Speech encoder files as they are published: every naming gives the same features."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk import wav2vec

HOST = StandaloneHost(device="cpu")
SOUND = np.random.default_rng(2).standard_normal(12000) * 0.1
HEADER = {"wanvideo.num_heads": "2"}
OLD = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def renamed(tensors, how):
    """The tensors under the names of another export."""
    named = dict(tensors)
    if "new" in how:
        named = {newly_named(key): value for key, value in named.items()}
    if "bare" in how:
        named = {key.removeprefix("wav2vec2."): value for key, value in named.items()}
    if "training" in how:
        named |= {"lm_head.weight": torch.randn(3, 4), "quantizer.codevectors": torch.randn(1, 2, 3)}
    if "unmasked" in how:
        named = {key: value for key, value in named.items() if "masked_spec_embed" not in key}
    return named


def newly_named(key):
    for old, new in OLD.items():
        key = key.replace(f"pos_conv_embed.conv.{old}", f"pos_conv_embed.conv.{new}")
    return key


def load(tensors, folder, dtype=torch.float32):
    path = folder / "speech.safetensors"
    save_file({key: value.float().contiguous() for key, value in tensors.items()}, path, metadata=HEADER)
    return wav2vec.load_wav2vec(path, dtype=dtype, host=HOST)


@pytest.mark.parametrize("how", [{"bare"}, {"new"}, {"bare", "new"}, {"training"}, {"unmasked"}, {"bare", "training"}])
def test_every_naming_gives_the_same_features(how, tmp_path):
    tensors = tiny.wav2vec(seed=4).tensors
    want = load(tensors, tmp_path).encode(SOUND, 19)
    other = renamed(tensors, how)
    assert set(other) != set(tensors) or how == {"unmasked"}
    assert torch.equal(load(other, tmp_path).encode(SOUND, 19), want)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_low_precision_stays_close(dtype, bound, tmp_path):
    tensors = tiny.wav2vec(seed=5).tensors
    want = load(tensors, tmp_path).encode(SOUND, 19)
    got = load(tensors, tmp_path, dtype).encode(SOUND, 19)
    assert got.dtype == torch.float32 and (got - want).norm() / want.norm() < bound


def test_an_incomplete_file_is_named(tmp_path):
    tensors = tiny.wav2vec().tensors
    short = {key: value for key, value in tensors.items() if "layers.1.attention.q_proj.weight" not in key}
    with pytest.raises(ValueError, match=r"speech\.safetensors lacks 1 .*layers\.1\.attention\.q_proj\.weight"):
        load(short, tmp_path)


def test_a_large_encoder_is_named(tmp_path):
    tensors = dict(tiny.wav2vec().tensors)
    tensors["wav2vec2.feature_extractor.conv_layers.1.layer_norm.weight"] = torch.ones(4)
    with pytest.raises(ValueError, match="is a large Wav2Vec2"):
        load(tensors, tmp_path)


def test_the_encoder_leaves_no_hooks_behind(tmp_path):
    wav2vec = load(tiny.wav2vec().tensors, tmp_path)
    first = wav2vec.encode(SOUND, 19)
    assert torch.equal(wav2vec.encode(SOUND, 19), first) and not first.requires_grad
    assert not any(layer._forward_hooks for layer in wav2vec.model.encoder.layers)
