"""Speech nodes: the frame counts users ask for, the sound they get back, and what they are told."""

import logging

import numpy as np
import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.multitalk.colormatch import METHODS
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.modules.vae import load_vae

LOOP_NODES = ("WanVideoImageToVideoMultiTalk", "WanVideoImageToVideoSkyreelsv3_audio")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    before = get_host()
    folder = tmp_path_factory.mktemp("talk")
    tiny.wav2vec().save(folder / "wav2vec2/w.safetensors")
    tiny.vae(base_dim=4).save(folder / "vae/vae.safetensors")
    tiny.speech_module().save(folder / "diffusion_models/InfiniteTalk/single.safetensors")
    host = StandaloneHost(models=folder, outputs=folder / "output", device="cpu")
    set_host(host)
    yield host
    set_host(before)


@pytest.fixture(scope="module")
def wav2vec(host):
    return N["Wav2VecModelLoader"]().loadmodel("w.safetensors", "fp32", "main_device")[0]


def sound(seconds, rate=16000, seed=0):
    samples = np.random.default_rng(seed).standard_normal((1, 1, round(seconds * rate))) * 0.1
    return {"waveform": torch.from_numpy(samples), "sample_rate": rate}


def encode(wav2vec, first, frames, fps=25.0, how="para", **others):
    return N["MultiTalkWav2VecEmbeds"]().process(wav2vec, True, fps, frames, first, 1.0, 1.0, how, **others)


@pytest.mark.parametrize("fps", [25.0, 30.0, 23.976, 16.0, 60.0])
@pytest.mark.parametrize("frames", [1, 4, 29, 57])
def test_long_sound_gives_exactly_the_frames_asked_for(wav2vec, frames, fps):
    embeds, heard, count = encode(wav2vec, sound(60 / fps), frames, fps)
    assert count == embeds.num_frames == frames
    assert 0 <= heard["waveform"].shape[-1] / 16000 - frames / fps < 1 / 16000


@pytest.mark.parametrize("seconds", [0.2, 0.39, 1.0, 1.5])
def test_short_sound_sets_the_length(wav2vec, seconds):
    embeds, heard, count = encode(wav2vec, sound(seconds, 48000), 1000)
    assert count == embeds.num_frames == int(round(seconds * 25, 6))
    assert heard["waveform"].shape[-1] == pytest.approx(seconds * 16000, abs=1)


def test_sound_shorter_than_a_frame_is_named(wav2vec):
    with pytest.raises(ValueError, match="shorter than one video frame"):
        encode(wav2vec, sound(0.02), 100)


def test_other_frame_rates_are_warned_of(wav2vec, caplog):
    with caplog.at_level(logging.WARNING):
        encode(wav2vec, sound(0.5), 5, 25.0)
        assert "25 fps" not in caplog.text
        encode(wav2vec, sound(0.5), 5, 30.0)
    assert "trained at 25 fps" in caplog.text


def test_what_follows_the_sound_is_encoded_silence(wav2vec):
    embeds, _, _ = encode(wav2vec, sound(1.0), 100)
    want = wav2vec.encode(np.zeros(4 * 16000), 100)
    window = embeds.window(Window((), tuple(range(22, 43)), end=100)).audio[0, 0]
    assert torch.equal(window[3 + 5, 2], want[5]) and torch.equal(window[2, 2], embeds.features[0][24])
    assert not torch.equal(window[2, 2], window[8, 2])


@pytest.mark.parametrize(("how", "length"), [("para", 30), ("add", 42)])
def test_two_speakers_and_their_masks(wav2vec, how, length):
    masks = torch.rand(2, 8, 8)
    embeds, heard, count = encode(wav2vec, sound(1.2), 100, how=how, audio_2=sound(0.5, seed=1), ref_target_masks=masks)
    assert count == embeds.num_frames == length and len(embeds.features) == 2
    assert heard["waveform"].shape[-1] == (19200 if how == "para" else length * 640)
    window = embeds.window(Window((), tuple(range(9))))
    assert window.audio.shape[1] == 2 and window.masks is masks


def test_a_missing_mask_is_named_before_anything_is_encoded(wav2vec, monkeypatch):
    monkeypatch.setattr(type(wav2vec), "encode", None)
    third = {"audio_2": sound(0.5), "audio_4": sound(0.5)}
    with pytest.raises(ValueError, match="3 speakers but 2 masks .* the mask of audio_4 is missing"):
        encode(wav2vec, sound(1.2), 100, ref_target_masks=torch.ones(2, 8, 8), **third)
    with pytest.raises(ValueError, match="in the order audio_1, audio_2, audio_4"):
        encode(wav2vec, sound(1.2), 100, **third)
    empty = torch.tensor([1.0, 0, 1])[:, None, None].expand(3, 8, 8)
    with pytest.raises(ValueError, match="mask of audio_2 in ref_target_masks is empty"):
        encode(wav2vec, sound(1.2), 100, ref_target_masks=empty, **third)


@pytest.mark.parametrize("frames", [1, 29, 100, 333])
def test_silence_of_any_length(wav2vec, frames):
    (embeds,) = N["MultiTalkSilentEmbeds"]().process(frames, wav2vec)
    assert embeds.num_frames == frames and embeds.features[0].isfinite().all()
    whole = wav2vec.encode(np.zeros(4 * 16000), 100)
    assert torch.equal(embeds.features[0], whole.repeat(4, 1, 1)[:frames])


def test_module_file_is_found(host):
    (found,) = N["MultiTalkModelLoader"]().loadmodel("InfiniteTalk\\single.safetensors")
    assert found.path == host.find_file("diffusion_models", "InfiniteTalk/single.safetensors")
    with pytest.raises(FileNotFoundError, match="gone"):
        N["MultiTalkModelLoader"]().loadmodel("gone.safetensors")


def test_a_failed_download_says_what_to_do(host, monkeypatch):
    def fail(*positional, **named):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(RuntimeError, match=r"facebook/wav2vec2-base-960h could not be downloaded .*by hand"):
        N["DownloadAndLoadWav2VecModel"]().loadmodel("facebook/wav2vec2-base-960h", "fp32", "main_device")


def test_settings_of_the_loop(host):
    vae = load_vae(host.find_file("vae", "vae.safetensors"), dtype=torch.float32, host=host)
    node = N["WanVideoImageToVideoMultiTalk"]()
    picture = torch.rand(2, 40, 50, 4)
    embeds, path = node.process(
        vae, 50, 36, 13, 5, True, "hm", start_image=picture, mode="multitalk", tiled_vae=True, output_path="frames"
    )
    loop = embeds.loop
    assert embeds.latent_shape == (16, 4, 4, 6) and embeds.num_frames == 13
    assert loop.start_images.shape == (3, 2, 32, 48) and loop.start_images.abs().max() <= 1
    assert (loop.window_frames, loop.motion_frames, loop.mode, loop.colormatch) == (13, 5, "multitalk", "hm")
    assert loop.tiled_vae and loop.offload_between_windows and loop.vae is vae
    assert path == loop.output_path and path.startswith(str(host.output_dir()) + "/frames/")
    assert path.endswith("_multitalk_output")
    bare, empty = node.process(vae, 32, 32, 13, 5, False, "disabled")
    assert empty == "" and bare.loop.start_images is None


def test_colour_methods_on_the_widget_are_those_that_exist():
    options = [set(N[name].INPUT_TYPES()["required"]["colormatch"][0]) for name in LOOP_NODES]
    assert options[0] | {"reinhard_torch"} == options[1] == set(METHODS) | {"disabled"}


def test_in_turn_every_speaker_is_heard_and_a_cut_is_named(wav2vec, caplog):
    embeds, heard, count = encode(wav2vec, sound(4.5), 81, how="add", audio_2=sound(2.0, seed=1))
    assert count == embeds.num_frames == 81 + 50
    assert embeds.features[0][:81].any() and not embeds.features[0][81:].any()
    assert embeds.features[1][81:].any() and not embeds.features[1][:81].any()
    assert heard["waveform"].shape[-1] == (81 + 50) * 640
    assert "audio_1 lasts 4.50 s, of which num_frames leaves the first 3.24 s" in caplog.text
    assert "audio_2 lasts" not in caplog.text


def test_nan_in_a_sound_is_named(wav2vec):
    spoiled = sound(0.5, seed=1)
    spoiled["waveform"][0, 0, 4000] = float("nan")
    with pytest.raises(ValueError, match="sound of audio_2 holds NaN"):
        encode(wav2vec, sound(0.5), 10, audio_2=spoiled)


def test_speech_of_hours_has_no_limit_of_ten_thousand_frames(host):
    for node in ("MultiTalkWav2VecEmbeds", "MultiTalkSilentEmbeds"):
        assert N[node].INPUT_TYPES()["required"]["num_frames"][1]["max"] >= 10 * 3600 * 25
