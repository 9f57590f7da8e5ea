"""Speech features against a float64 form, windows against a plain loop, preparation against its definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk import audio
from wanvideo_wrapper.multitalk import wav2vec as speech
from wanvideo_wrapper.multitalk.audio import AudioOptions, MultiTalkEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Window

FACTS = Path(__file__).parents[1] / "data" / "checkpoints" / "wav2vec2_base.json"
HOST = StandaloneHost(device="cpu")


def load(tmp_path, seed=0):
    model = tiny.wav2vec(seed)
    model.save(tmp_path / "w.safetensors", torch.float32)
    return model, speech.load_wav2vec(tmp_path / "w.safetensors", dtype=torch.float32, host=HOST)


def wav2vec_float64(tensors, sound, frames, heads, layers):
    p = {k.removeprefix("wav2vec2."): v.double() for k, v in tensors.items()}
    x = torch.from_numpy(sound).double()[None, None]
    for i, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        x = F.conv1d(x, p[f"feature_extractor.conv_layers.{i}.conv.weight"], stride=stride)
        if i == 0:
            weight, bias = (p[f"feature_extractor.conv_layers.0.layer_norm.{n}"] for n in ("weight", "bias"))
            mean, deviation = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
            x = (x - mean) / (deviation + 1e-5).sqrt() * weight[:, None] + bias[:, None]
        x = F.gelu(x)
    count = x.shape[-1]
    places = torch.linspace(0, count - 1, frames, dtype=torch.float64)
    low = places.floor().long().clamp(max=count - 2)
    share = places - low
    x = (x[0][:, low] * (1 - share) + x[0][:, low + 1] * share).T

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = linear(norm(x, "feature_projection.layer_norm"), "feature_projection.projection")
    g, v = (p[f"encoder.pos_conv_embed.conv.weight_{n}"] for n in "gv")
    kernel = g * v / v.square().sum(dim=(0, 1), keepdim=True).sqrt()
    groups, size = x.shape[-1] // kernel.shape[1], kernel.shape[2]
    place = F.conv1d(x.T[None], kernel, p["encoder.pos_conv_embed.conv.bias"], padding=size // 2, groups=groups)
    place = place[..., : -1 if size % 2 == 0 else None]
    x = norm(x + F.gelu(place[0].T), "encoder.layer_norm")
    outputs = []
    for i in range(layers):
        name = f"encoder.layers.{i}"
        q, k, v = (linear(x, f"{name}.attention.{n}_proj").view(frames, heads, -1).transpose(0, 1) for n in "qkv")
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = norm(x + linear(out.transpose(0, 1).flatten(1), f"{name}.attention.out_proj"), f"{name}.layer_norm")
        h = F.gelu(linear(x, f"{name}.feed_forward.intermediate_dense"))
        x = norm(x + linear(h, f"{name}.feed_forward.output_dense"), f"{name}.final_layer_norm")
        outputs.append(x)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("samples", "frames"), [(16000, 25), (9000, 31), (400, 1)])
def test_features_equal_their_float64_form(samples, frames, tmp_path):
    model, wav2vec = load(tmp_path, seed=int(torch.randint(1000, ())))
    if frames == 1:
        # A single feature frame has nothing to interpolate between.
        assert wav2vec.encode(np.random.standard_normal(samples), 1).shape == (1, 2, tiny.SPEECH_DIM)
        return
    sound = np.random.standard_normal(samples) * 0.1
    got = wav2vec.encode(sound, frames).double()
    want = wav2vec_float64(model.tensors, sound, frames, 2, 2)
    assert got.shape == (frames, 2, tiny.SPEECH_DIM)
    assert (got - want).norm() / want.norm() < 1e-4


@pytest.mark.parametrize("seconds", [3.0, 7.3])
def test_convolutions_in_pieces_equal_one_pass(tmp_path, monkeypatch, seconds):
    _, wav2vec = load(tmp_path, seed=int(torch.randint(1000, ())))
    generator = np.random.default_rng(np.random.randint(2**31))
    sound = generator.standard_normal(round(seconds * 16000)) * np.linspace(0.01, 0.5, round(seconds * 16000))
    frames = audio.frame_count(len(sound), 25.0)
    whole = wav2vec.encode(sound, frames).double()
    monkeypatch.setattr(speech, "CONV_PIECE", 37)
    got = wav2vec.encode(sound, frames).double()
    assert (got - whole).norm() / whole.norm() < 1e-5


def test_sums_need_no_float64_of_the_device(tmp_path, monkeypatch):
    _, wav2vec = load(tmp_path, seed=1)
    asked = []
    monkeypatch.setattr(speech, "CONV_PIECE", 9)
    monkeypatch.setattr(speech, "with_float64", lambda device: asked.append(device) or torch.device("cpu"))
    assert wav2vec.encode(np.random.standard_normal(9000), 12).isfinite().all() and asked == [torch.device("cpu")]


def test_attention_in_pieces(tmp_path, monkeypatch):
    """Beyond the limit every piece equals a whole pass over what it sees; nothing is lost at the seams."""
    _, wav2vec = load(tmp_path)
    sound = np.random.standard_normal(12 * 16000) * 0.1
    seen = []
    layers = speech.Wav2Vec._layers
    monkeypatch.setattr(speech.Wav2Vec, "_layers", lambda self, x: seen.append((x, layers(self, x))) or seen[-1][1])
    monkeypatch.setattr(speech, "CONV_PIECE", 50)
    wav2vec.encode(sound, 300)
    ((all_features, _),) = seen
    for name, value in (("WHOLE_SECONDS", 5), ("PIECE_SECONDS", 4), ("CONTEXT_SECONDS", 1)):
        monkeypatch.setattr(speech, name, value)
    seen.clear()
    got = wav2vec.encode(sound, 300)
    ranges = [(range(100), range(125)), (range(100, 200), range(75, 225)), (range(200, 300), range(175, 300))]
    assert list(speech.pieces(300, 25.0)) == ranges
    for (kept, visible), (features, outputs) in zip(ranges, seen, strict=True):
        torch.testing.assert_close(features, all_features[..., visible.start : visible.stop], atol=1e-5, rtol=1e-4)
        part = outputs[kept.start - visible.start : kept.stop - visible.start]
        assert torch.equal(got[kept.start : kept.stop], part)


@pytest.mark.parametrize("frames", [7500, 7501, 90000])
def test_pieces_cover_every_frame_once_with_context(frames):
    cut = list(speech.pieces(frames, 25.0))
    assert [f for kept, _ in cut for f in kept] == list(range(frames))
    assert (len(cut) == 1) == (frames == 7500)
    for kept, visible in cut:
        assert visible.start == max(kept.start - 375, 0) or len(cut) == 1
        assert visible.stop == min(kept.stop + 375, frames)
        assert len(visible) <= 7500


def test_every_published_key_is_one_parameter():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    found = {}
    for key, value in json.loads(FACTS.read_text()).items():
        if isinstance(value, dict) and "count" in value:
            found |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in range(value["count"])}
        elif key != "_meta":
            found[key] = tuple(value)

    class File:
        shapes = found
        metadata = {}
        path = FACTS

    with torch.device("meta"):
        model = speech._build(File, speech.PREFIX)
        Wav2Vec2Model(Wav2Vec2Config())
    names = {speech.PREFIX + speech._stored_name(n, File, speech.PREFIX): p for n, p in model.named_parameters()}
    assert {k: tuple(v.shape) for k, v in names.items()} == found


def test_another_kind_of_file_is_named(tmp_path):
    tiny.vae().save(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae\.safetensors is no Wav2Vec2 encoder"):
        speech.load_wav2vec(tmp_path / "vae.safetensors", dtype=torch.float32, host=HOST)


@pytest.mark.parametrize("frames", [range(9), range(20, 33), range(28, 45), range(0, 40, 2)])
@pytest.mark.parametrize("with_silence", [True, False])
def test_windows_by_absolute_frame(frames, with_silence):
    feature, silence = torch.randn(30, 2, 4), torch.randn(5, 2, 4)
    embeds = MultiTalkEmbeds(features=(feature,), scale=0.5, silence=silence if with_silence else None)
    window = embeds.window(Window((), tuple(frames), end=12))
    assert window.audio.shape == (1, 1, len(frames), 5, 2, 4) and float(window.scale) == 0.5
    repeated = frames[0] == 0
    for row, frame in enumerate(frames):
        for column, offset in enumerate((-2, -1, 0, 1, 2)):
            index = max(frame + offset, 0)
            tail = silence if with_silence else feature.flip(0)
            want = feature[index] if index < 30 else feature[-1] if repeated else tail[(index - 30) % len(tail)]
            assert torch.equal(window.audio[0, 0, row, column], want)


def test_the_last_sound_is_repeated_where_there_is_no_loop():
    embeds = MultiTalkEmbeds(features=(torch.randn(30, 2, 4),), silence=torch.randn(5, 2, 4))
    window = embeds.window(Window((), tuple(range(26, 35))))
    assert torch.equal(window.audio[0, 0, -1], embeds.features[0][-1:].expand(5, -1, -1))


def sound_of(samples, rate, channels=1):
    generator = np.random.default_rng(np.random.randint(2**31))
    return {"waveform": torch.from_numpy(generator.standard_normal((1, channels, samples)) * 0.05), "sample_rate": rate}


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1), (48000, 2)])
def test_any_rate_and_channels(rate, channels):
    sound = audio.prepare_sound(sound_of(rate * 2, rate, channels), 1.5, AudioOptions())
    assert len(sound) == 24000 and np.isfinite(sound).all()


def test_loudness_is_minus_23_lufs():
    import pyloudnorm

    sound = audio.prepare_sound(sound_of(48000, 16000), 3.0, AudioOptions())
    assert pyloudnorm.Meter(16000).integrated_loudness(sound) == pytest.approx(-23, abs=0.01)


def test_a_long_sound_is_prepared_as_a_short_one(monkeypatch):
    """Silence and quiet speech in it, which the gates of loudness leave out."""
    asked = sound_of(44100 * 12, 44100, 2)
    asked["waveform"][..., : 44100 * 2] = 0
    asked["waveform"][..., 44100 * 2 : 44100 * 5] *= 0.01
    for options in (AudioOptions(), AudioOptions(add_noise_floor=True, smooth_transients=True)):
        whole = audio.prepare_sound(asked, 11.9, options)
        with monkeypatch.context() as patch:
            patch.setattr(audio, "PIECE", 4 * audio.SAMPLE_RATE // 5)
            pieces = audio.prepare_sound(asked, 11.9, options)
        assert len(pieces) == len(whole) == 190400
        level = float(pieces @ whole / (whole @ whole))
        assert level == pytest.approx(1, abs=2e-3) and np.abs(pieces - level * whole).max() < 2e-5
    silent = {"waveform": torch.zeros(1, 1, 32000), "sample_rate": 16000}
    monkeypatch.setattr(audio, "PIECE", 16000)
    assert not audio.prepare_sound(silent, 2, AudioOptions()).any()


@pytest.mark.parametrize("samples", [10, 3000, 32000])
def test_silence_and_short_sound_do_not_fail(samples):
    silent = {"waveform": torch.zeros(1, 1, samples), "sample_rate": 16000}
    assert np.array_equal(audio.prepare_sound(silent, 5, AudioOptions()), np.zeros(samples))
    assert len(audio.prepare_sound(sound_of(samples, 16000), 5, AudioOptions())) == samples


def test_empty_sound_is_named():
    with pytest.raises(ValueError, match="no samples"):
        audio.prepare_sound({"waveform": torch.zeros(1, 1, 0), "sample_rate": 16000}, 5, AudioOptions())


def test_noise_floor_and_low_pass():
    silent = {"waveform": torch.zeros(1, 1, 32000), "sample_rate": 16000}
    noisy = audio.prepare_sound(silent, 2, AudioOptions(add_noise_floor=True))
    assert 20 * np.log10(noisy.std()) == pytest.approx(-45, abs=0.5)
    high = {"waveform": torch.sin(torch.arange(32000) * 2 * np.pi * 7000 / 16000)[None, None], "sample_rate": 16000}
    options = AudioOptions(normalize_loudness=False, smooth_transients=True)
    assert audio.prepare_sound(high, 2, options)[8000:].std() < 0.1 * 0.707


@pytest.mark.parametrize("sequential", [False, True])
def test_speakers_at_once_and_in_turn(sequential, tmp_path):
    _, wav2vec = load(tmp_path)
    sounds = [np.random.default_rng(i).standard_normal(n) for i, n in enumerate((16000, 8000))]
    embeds = audio.encode_speech(wav2vec, sounds, fps=25, sequential=sequential, longest=1000)
    first, second = (wav2vec.encode(s, f) for s, f in zip(sounds, (25, 12), strict=True))
    total = 37 if sequential else 25
    assert embeds.num_frames == total and [len(f) for f in embeds.features] == [total, total]
    start = 25 if sequential else 0
    assert torch.equal(embeds.features[0][:25], first)
    assert torch.equal(embeds.features[1][start : start + 12], second)
    assert embeds.features[1].abs().sum() == pytest.approx(float(second.abs().sum()), rel=1e-5)
    assert audio.mix(sounds, sequential=sequential, seconds=9)["waveform"].shape[-1] == (24000 if sequential else 16000)


@pytest.mark.parametrize("fps", [23.7, 24, 25, 29.97])
def test_a_sound_that_is_cut_to_whole_frames_keeps_all_of_them(fps):
    for count in range(1000, 40000, 777):
        sound = np.arange(count)
        whole = audio.whole_frames(sound, fps)
        assert audio.frame_count(len(whole), fps) == audio.frame_count(count, fps)
        assert len(whole) * fps / 16000 - audio.frame_count(count, fps) < fps / 16000


def test_turns_end_with_whole_frames_and_the_longest_video(tmp_path):
    _, wav2vec = load(tmp_path)
    sounds = [audio.whole_frames(np.random.default_rng(i).standard_normal(16624), 25) for i in range(4)]
    assert {len(sound) for sound in sounds} == {25 * 640}
    embeds = audio.encode_speech(wav2vec, sounds, fps=25, sequential=True, longest=60)
    assert embeds.num_frames == 60 and not embeds.features[3].any()
    assert torch.equal(embeds.features[2][50:], wav2vec.encode(sounds[2], 25)[:10])
    assert audio.mix(sounds, sequential=True, seconds=60 / 25)["waveform"].shape[-1] == 60 * 640
